"""Find weights in a model folder other than those opened, which other programs may load."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..exceptions import CheckpointError
from .folders import FOLDER_WEIGHTS, NOT_WEIGHTS, find_weights, weights_of
from .hub_companions import same_content
from .hub_config import LIMIT, refuse_other_weights
from .modules import MODULES, files_below, module_folders, refuse_unused_weights
from .peft_config import CONFIG
from .read import TORCH_SUFFIXES
from .shards import INDEX, weight_map
from .texts import read_json

# names that programs look for in a folder
LOADED = (
    ".safetensors", *TORCH_SUFFIXES, INDEX, ".gguf", ".h5", ".keras", ".msgpack", ".nemo", ".onnx",
    ".neuron", ".ot", ".pb", ".pdparams", ".pt2", ".pte", ".rknn", ".tar", ".tflite", "weights.npz",
    ".joblib", ".pickle", ".pkl", ".skops",  # of scikit-learn, such as SetFit's head
)  # fmt: skip
PIPELINE = "model_index.json"  # of diffusers, which loads the weights in the folders below
# files that mark a folder as a model: of sentence-transformers, PEFT, OpenCLIP, diffusers
MARKS = (
    MODULES, "config_sentence_transformers.json", CONFIG, "open_clip_config.json", PIPELINE,
)  # fmt: skip
DESCRIBES = (  # fields of a config.json of a model: transformers, timm, diffusers, Keras, Router
    "model_type", "architectures", "auto_map", "architecture", "pretrained_cfg", "model_cfg",
    "_class_name", "class_name", "types",
)  # fmt: skip
OF_MACOS = b"\0\5\26\7"  # at the beginning of ._NAME, which it writes beside NAME
SKIPPED = ("training_args.bin", "optimizer.bin")  # by vLLM
BACKENDS = ("onnx", "openvino")  # folders in which other runtimes look for weights
ANYWHERE = re.compile(r".*\.(onnx|pte)|.*openvino.*\.xml")  # which they take from all below
MOST_FILES = 200_000  # in the folder of a soup


def other_weights(path: Path, ingredients: Sequence[Path]) -> Iterator[str]:
    """Names of other weights that a program may load from a folder, or next to a file.

    Weights in the module folders of sentence-transformers are not listed if the folder of an
    ingredient has the same.
    """
    folder = path if path.is_dir() else path.parent
    is_model = folder == path or any((folder / mark).exists() for mark in MARKS)
    is_model = is_model or _describes_model(folder / "config.json")
    if not is_model and find_weights(folder) is None:  # and it is not a skorch folder
        return
    file = weights_of(path) if path.is_dir() else path
    opened = {file.name, *(weight_map(file).values() if file.name.endswith(INDEX) else ())}
    for one in sorted(folder.iterdir()):
        if _may_be_loaded(one) and one.name not in opened:
            yield one.name
    listed = {one: module_folders(one) for one in ingredients}
    modules, runtimes = module_folders(folder), _of_runtimes(folder)
    refuse_unused_weights(folder, modules)
    yield from (str(one.relative_to(folder)) for one in sorted(runtimes))
    for module in modules:
        refuse_other_weights(module)
        name = module.relative_to(folder)
        known = _weights_by_name(one / name for one in ingredients if one / name in listed[one])
        for inner, (one,) in _weights_by_name([module]).items():
            if one not in runtimes and not any(same_content(one, other) for other in known[inner]):
                yield str(name / inner)


def _weights_by_name(folders: Iterable[Path]) -> defaultdict[Path, list[Path]]:
    """The weights of some folders by their paths in them, in the order of each."""
    found = defaultdict[Path, list[Path]](list)
    for folder in folders:
        for path in filter(_may_be_loaded, files_below(folder, MOST_FILES)):
            found[path.relative_to(folder)].append(path)
    return found


def _of_runtimes(folder: Path) -> set[Path]:
    """Files in the folders below that other programs, such as ONNX Runtime, would load."""
    found = set()
    is_pipeline = (folder / PIPELINE).is_file()
    judges = ["adapter"] if (folder / "judge_config.json").exists() else []
    for name in (*BACKENDS, *judges):  # which may be links
        found |= {*filter(_may_be_loaded, files_below(folder / name, MOST_FILES))}
    for path in files_below(folder, MOST_FILES):
        is_loaded = ANYWHERE.fullmatch(path.name.lower()) or (is_pipeline and _may_be_loaded(path))
        if path.parent != folder and is_loaded:
            found.add(path)
    return found


def _describes_model(path: Path) -> bool:
    """Whether a config.json is that of a model, not, say, the settings of an experiment."""
    if not path.exists():
        return False
    try:
        config = read_json(path, LIMIT)
    except CheckpointError:
        return True
    return isinstance(config, dict) and any(field in config for field in DESCRIBES)


def _may_be_loaded(path: Path) -> bool:
    name = path.name.lower()
    if _is_of_macos(path):
        return False
    is_index = re.fullmatch(r".+\.index\..+\.json", name)  # of a variant of transformers
    if name == CONFIG or is_index:
        return True
    return name.endswith(LOADED) and not _is_of_training(path.parent, name)


def _is_of_macos(path: Path) -> bool:
    if not path.name.startswith("._") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == OF_MACOS


def _is_of_training(folder: Path, name: str) -> bool:
    """Whether a file is that of a training loop, beside weights that all programs prefer to it.

    Without such weights, timm takes the first file; vLLM reads all files of a format.
    """
    preferred = next((one for one in FOLDER_WEIGHTS if (folder / one).is_file()), None)
    if preferred is None or not NOT_WEIGHTS.fullmatch(name):
        return False
    if preferred.startswith("params"):  # of skorch
        return not (folder / "config.json").exists()
    if preferred.startswith("pytorch_model"):
        return not name.endswith((".bin", ".safetensors")) or name in SKIPPED
    return not name.endswith(".safetensors")
