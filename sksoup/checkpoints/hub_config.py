"""Read a Hugging Face config.json, and drop what would download, load or run something."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError
from ..tables import short
from .protocol import TensorInfo, is_text
from .read import KEPT, RealFile
from .texts import read_json, read_text

LIMIT = 8 << 20  # bytes; with 20,000 labels a config has about 1 MB
MOST_BYTES = 100_000_000  # of files that need not be configs
MOST_VALUES, MOST_DEPTH = 500_000, 50  # each label is two values
MOST_BITS = 1 << 22  # of all integers, so that products take seconds; 100,000 labels have 2^21
LARGEST = 1 << 128  # powers of larger integers take minutes
MANY = 1 << 21  # layers, labels: transformers makes lists of this length before any layer
MANY_SHARED = 1000  # layers, besides one for each tensor
LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|(\w+_)?layers|(\w+_)?depths?")
MOST_TURNS = 1 << 26  # about a second; 20,000 labels and 128 layers make 2^21
COUNTS = re.compile(
    r"layer|depth|block|stage|expert|label|head|group|attention_types|dense|point|level|bins"
    r"|strides?$|ratios?$|rates$|patch_sizes$"
)
IMAGE, MOST_PIXELS = re.compile(r"(image|img)_size$"), 4096  # some make tables of all pixels
STRIDES, MOST_STRIDES = re.compile(r"strides?$"), 100  # of dimensions or stages; used in powers
FOREIGN_CODE = ("auto_map", "custom_pipelines")
# how attention and experts are computed does not depend on the weights, and unknown names make
# transformers download and run a kernel: dropped, so that the default is used
KERNELS = ("attn_implementation", "experts_implementation")
BUILT_IN = ("eager", "sdpa", "grouped_mm", "batched_mm")
# an 'attribute_map' could rename other fields to these; FNet computes the same without the last
# one, which makes it build matrices of any size with scipy, on which nothing here has a bound
DROPPED = (
    "attribute_map", "name_or_path", "_name_or_path", "_auto_class",
    "use_tpu_fourier_optimizations",
)  # fmt: skip
PRETRAINED = "use_pretrained_backbone"
BACKBONE = (PRETRAINED, "use_timm_backbone", "backbone")
FLOAT = "__float__"  # the key by which transformers writes infinite numbers
TABLES = ("id2label", "label2id")  # their keys are no fields
# fields that make transformers read other weights, another config.json or other fields of it
OTHER_FILES = ("transformers_weights", "configuration_files", "attribute_map")
SENTENCE_CONFIGS = "sentence_*config.json"  # passed to transformers by sentence-transformers
# other files by which transformers finds a LoRA adapter or a program, and the field that names it
OTHER_CONFIGS = {
    "decision.json": "adapter", "judge_config.json": "adapter_subfolder",
    "export.json": "components",
}  # fmt: skip
# arguments for the processor; all other fields that end in args or kwargs are for the model or
# its configuration
PROCESSOR_ARGUMENTS = ("tokenizer_args", "processor_kwargs", "processing_kwargs")
# arguments that do not change the weights; sentence-transformers drops trust_remote_code
KNOWN_ARGUMENTS = (
    "dtype", "torch_dtype", "attn_implementation", "experts_implementation", "device_map",
    "low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "add_pooling_layer", "num_labels",
    "problem_type", "use_cache", "is_decoder", "is_causal", "return_dict", "output_attentions",
    "output_hidden_states", "use_bidirectional_attention", "reference_compile", "unpad_inputs",
    "use_memory_efficient_attention", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "classifier_dropout",
)  # fmt: skip
# options and names with which timm reads files or the hub: 'hf-hub:org/name', 'local-dir:/folder'
TIMM_NAME = re.compile(r"[\w.]+")
TIMM_OPTIONS = ("model_args", "backbone_kwargs", "timm_default_kwargs")
TIMM_FILES = ("hf_hub_filename", "file", "state_dict", "custom_load")  # in its pretrained_cfg
TIMM_LOADS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


def read_config(path: Path, header: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The contents of a config.json, safe to build from; raise an error if it can't be."""
    config = read_json(path, LIMIT, object_hook=_decode_float)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{str(path)!r} can't be used: it holds a {type(config).__name__}, expected an object "
            f"with 'architectures' and 'model_type'."
        )
    _refuse_large(config, path)
    if not is_text(json.dumps(config, ensure_ascii=False)):  # labels are written to recipes
        raise CheckpointError(
            f"{str(path)!r} can't be used: a text in it has an unpaired surrogate, which is not "
            f"valid Unicode. Correct the file, or pass module=build_model."
        )
    most = max([MANY, *(size for info in header.values() for size in info.shape)])
    layers = MANY_SHARED + len(header)
    for part in _parts(config):
        _refuse_what_acts(part, path)
        _refuse_counts(part, most, layers, path)
        _refuse_images(part, path)
        _drop_what_acts(part)
    return config


def refuse_quantized(path: Path) -> None:
    """Raise an error if a config.json says that the weights are quantized."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        file = RealFile.at(config)
    except CheckpointError:  # there is none
        return
    if _is_quantized(file):
        raise _quantized(config)


@lru_cache(maxsize=KEPT)  # many files may share one config.json
def _is_quantized(file: RealFile) -> bool:
    """Whether a part of a config is about quantization; not if the config itself is invalid."""
    try:
        found = json.loads(read_text(file.path, LIMIT))
    except (CheckpointError, ValueError, RecursionError):
        return False
    return any(part.get("quantization_config") for part in _parts(found))


def refuse_other_weights(folder: Path, left_out: Collection[str] = ()) -> None:
    """Raise an error if other programs would load other weights because of the configuration.

    Files that are ``left_out`` of a copy are not looked at.
    """
    for path in [folder / "config.json", *sorted(folder.glob(SENTENCE_CONFIGS))]:
        if path.exists() and not path.is_dir():
            _refuse_others_in(RealFile.at(path), path.name == "config.json")
    if not (folder / "config.json").exists():  # the others are of something else
        return
    for name, field in OTHER_CONFIGS.items():
        if name not in left_out and (path := folder / name).is_file():
            _refuse_other_files({field: _names_others(RealFile.at(path), field)}, field, path)


@lru_cache(maxsize=KEPT)  # many paths may be links to one file
def _names_others(file: RealFile, field: str) -> bool:
    """Whether a file has this field; not if it is no JSON, which transformers can't read either."""
    text = read_text(file.path, MOST_BYTES)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found.get(field))


@lru_cache(maxsize=KEPT)  # many paths may be links to one file
def _refuse_others_in(file: RealFile, is_config: bool) -> None:
    """Raise an error for the fields of one file."""
    path = file.path
    try:
        config = json.loads(read_text(path, LIMIT))
    except json.JSONDecodeError:  # other programs can't read it either
        return
    except (ValueError, RecursionError) as error:  # too large or too deep: others may
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(path)!r} can't be read: {error}.") from error
    for part in _parts({"": config}):
        for field in OTHER_FILES:
            _refuse_other_files(part, field, path)
        _refuse_other_files_of_timm(part, path)
    if not isinstance(config, dict):
        return
    if "architecture" in config:  # older configs of timm are a pretrained_cfg
        _refuse_other_files_of_timm({"pretrained_cfg": config}, path)
    if not is_config:
        _refuse_other_arguments(config, path)
    elif str(config.get("path")).endswith(".json"):  # the weights of a SparseStaticEmbedding
        _refuse_other_files(config, "path", path)


def _refuse_other_arguments(config: Mapping[str, Any], path: Path) -> None:
    """Raise an error for arguments that make transformers load or rename other files."""
    if config.get("backend", "torch") != "torch":
        raise CheckpointError(
            f"{str(path)!r} makes sentence-transformers load weights of the backend "
            f"{config['backend']!r}, expected 'torch'. Remove the field 'backend'."
        )
    for field, arguments in config.items():
        if not field.endswith(("args", "kwargs")) or field in PROCESSOR_ARGUMENTS or not arguments:
            continue
        given = arguments if isinstance(arguments, dict) else {field: arguments}
        for name, value in given.items():
            is_plain = value is None or isinstance(value, (str, bool, int, float))
            if value is None or value is False or (name in KNOWN_ARGUMENTS and is_plain):
                continue
            raise CheckpointError(
                f"{str(path)!r} passes the argument {name!r} (in {field!r}) to transformers, which "
                f"may then load other weights than those opened here. Remove it, or load the model "
                f"with SentenceTransformer(..., {field}=...)."
            )


def _refuse_other_files(part: Mapping[str, Any], field: str, path: Path) -> None:
    if part.get(field):
        raise CheckpointError(
            f"{str(path)!r} refers to other weights than those opened here, or to another "
            f"configuration ({field!r}), which other programs would read. Remove that field."
        )


def _refuse_other_files_of_timm(part: Mapping[str, Any], path: Path) -> None:
    for name, fields in (("pretrained_cfg", TIMM_FILES), ("model_args", TIMM_LOADS)):
        if isinstance(given := part.get(name), dict):
            for field in fields:
                _refuse_other_files(given, field, path)


def output_labels(id2label: Any) -> tuple[str, ...]:
    """The output names in a config's ``id2label``, unless they are transformers' defaults."""
    if not isinstance(id2label, Mapping):
        return ()
    known = {str(k): name for k, name in id2label.items()}
    names = [known.get(str(k)) for k in range(len(known))]
    labels = tuple(name for name in names if isinstance(name, str))
    made_up = tuple(f"LABEL_{k}" for k in range(len(names)))
    return () if labels == made_up or len(set(labels)) < len(names) else labels


def _decode_float(part: dict[str, Any]) -> Any:
    """Transformers writes an infinite float as {"__float__": "Infinity"}."""
    value = part.get(FLOAT)
    return float(value) if len(part) == 1 and isinstance(value, str) else part


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All objects in a config, at any depth."""
    todo: list[Any] = [config]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            todo.extend(part.values())
        elif isinstance(part, list):
            todo.extend(part)


def prepare_fields(described: dict[str, Any], transformers: Any, path: Path) -> None:
    """Drop fields that would replace functions of the configuration; refuse those of Python.

    Backbones are built without weights also where leaving out a field means pretrained ones.
    """
    configs = transformers.CONFIG_MAPPING
    todo = [described]
    while todo:
        part = todo.pop()
        kind = part.get("model_type")
        own = configs[kind] if isinstance(kind, str) and kind in configs else None
        for field in [*part]:
            if field.startswith("__") and field.endswith("__") and field != FLOAT:
                raise CheckpointError(
                    f"{str(path)!r} has the field {short(field)}, which Python uses for itself. "
                    f"Remove it, or pass module=build_model."
                )
            if callable(getattr(own or transformers.PretrainedConfig, field, None)):
                del part[field]
        if own is not None and _has_backbone(own):
            part[PRETRAINED] = False
        todo += [p for name, p in part.items() if isinstance(p, dict) and name not in TABLES]


@cache
def _has_backbone(config: type) -> bool:
    """Whether a class of configurations may ask for a pretrained backbone."""
    return PRETRAINED in inspect.signature(config).parameters


def _refuse_what_acts(part: dict[str, Any], path: Path) -> None:
    """Raise an error for code, other repositories and quantized weights, which are essential."""
    for field in FOREIGN_CODE:
        if part.get(field):
            raise CheckpointError(
                f"{str(path)!r} refers to custom code ({field!r}), which sksoup never runs. Pass "
                f"the architecture: module=build_model."
            )
    for field in ("transformers_weights", "configuration_files"):
        _refuse_other_files(part, field, path)
    if part.get("quantization_config"):
        raise _quantized(path)
    is_timm = part.get("use_timm_backbone") is True or part.get("model_type") == "timm_backbone"
    for field in ("backbone", "default_backbone", "architecture"):
        name = part.get(field)
        if not isinstance(name, str) or (field == "backbone" and part.get("backbone_config")):
            continue
        if not TIMM_NAME.fullmatch(name) or (field != "architecture" and not is_timm):
            raise CheckpointError(
                f"{str(path)!r} refers to another model ({field!r}: {name!r}), whose configuration "
                f"would have to be downloaded, which sksoup never does. Write that configuration "
                f"to 'backbone_config', or pass module=build_model."
            )


def _quantized(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} can't be used: its weights are quantized ('quantization_config') and can't "
        f"be averaged. Save a dequantized checkpoint (transformers: model.dequantize()); if it "
        f"already is dequantized, remove that field."
    )


def _refuse_counts(part: dict[str, Any], most: int, layers: int, path: Path) -> None:
    """Raise an error for implausible counts: transformers makes lists of that length.

    It also repeats lists that many times, or searches them that often. Layers may share weights, as
    in ALBERT, so that a small module may take long to run.
    """
    counts = {
        field: sum(map(abs, _integers(v))) for field, v in part.items() if COUNTS.search(field)
    }
    longest = max((_n_items(value) for value in part.values()), default=0)
    for field, count in counts.items():
        of_layers = LAYERS.fullmatch(field)
        is_number = of_layers and type(part[field]) is int  # not which layers
        limit = min(most, layers) if is_number else most
        n_items = layers if of_layers else MOST_STRIDES if STRIDES.search(field) else most
        for found, allowed in ((count, limit), (_n_items(part[field]), n_items)):
            if found > allowed:
                raise CheckpointError(
                    f"{str(path)!r} can't be built: {field!r} is more than {allowed}, too many for "
                    f"these weights. Correct the file, or pass module=build_model."
                )
        if count * longest > MOST_TURNS:
            raise CheckpointError(
                f"{str(path)!r} can't be built: it has a list of {longest} items together with "
                f"{field!r} of {count}, more than any model needs. Correct the file, or pass "
                f"module=build_model."
            )


def _refuse_images(part: dict[str, Any], path: Path) -> None:
    """Raise an error for images of implausible size."""
    for field, value in part.items():
        if IMAGE.search(field) and max(_integers(value), default=0) > MOST_PIXELS:
            raise CheckpointError(
                f"{str(path)!r} can't be built: {field!r} is more than {MOST_PIXELS} pixels. "
                f"Correct the file, or pass module=build_model."
            )


def _integers(value: Any) -> Iterator[int]:
    """The integers in a value, or in lists of lists of them."""
    return (leaf for leaf in _leaves(value) if type(leaf) is int)


def _n_items(value: Any) -> int:
    """The number of items in a list, including nested lists."""
    return sum(1 for _ in _leaves(value)) if isinstance(value, list) else 0


def _refuse_large(config: dict[str, Any], path: Path) -> None:
    """Raise an error for a config with very many values, or very deep ones, which is copied."""
    todo: list[tuple[Any, int]] = [(config, 1)]
    n_values, n_bits, deepest, largest = 0, 0, 0, 0
    while todo:
        part, depth = todo.pop()
        if isinstance(part, (dict, list)):
            n_values, deepest = n_values + len(part), max(deepest, depth)
            inner = part.values() if isinstance(part, dict) else part
            todo.extend((value, depth + 1) for value in inner)
        elif isinstance(part, int):
            n_bits, largest = n_bits + part.bit_length(), max(largest, abs(part))
    if n_bits > MOST_BITS or largest > LARGEST:
        raise CheckpointError(
            f"{str(path)!r} can't be used: its integers have {n_bits:,} bits, and the largest "
            f"{largest.bit_length()}, expected at most {MOST_BITS:,} and 128. Correct the file, or "
            f"pass module=build_model."
        )
    if n_values > MOST_VALUES or deepest > MOST_DEPTH:
        raise CheckpointError(
            f"{str(path)!r} can't be used: it holds {n_values:,} values, in objects in objects of "
            f"depth {deepest}, expected at most {MOST_VALUES:,} and {MOST_DEPTH}. Correct the "
            f"file, or pass module=build_model."
        )


def _leaves(value: Any) -> Iterator[Any]:
    """The items of nested lists, or the value itself."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo.extend(part)
        else:
            yield part


def _drop_what_acts(part: dict[str, Any]) -> None:
    """Drop fields that would load, download or run something not needed for the weights."""
    for field in (*KERNELS, *("_" + field for field in KERNELS)):
        if part.get(field) not in BUILT_IN:
            part.pop(field, None)
        part.pop(f"{field}_internal", None)
    for field in DROPPED:
        part.pop(field, None)
    if any(field in part for field in BACKBONE):  # its weights are the checkpoint's
        part[PRETRAINED] = False
    for field in TIMM_OPTIONS:
        if isinstance(options := part.get(field), dict):
            part[field] = {k: v for k, v in options.items() if k not in TIMM_LOADS}
