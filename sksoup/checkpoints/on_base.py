"""Convert adapters in the user's input to checkpoints of their base."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError, SoupWarning
from .adapters import AdapterCheckpoint, adapter_in_memory, is_peft_model, open_adapter, unwrapped
from .architecture import ModuleSource, find_architecture
from .base_model import BaseModel, base_of_folder, base_of_module, find_base_folder
from .hub import AUTO_CLASSES, HubModule
from .peft_config import CONFIG, PeftConfig, adapter_folder
from .protocol import Entry, TensorInfo
from .read import real_path
from .sources import open_checkpoint

# tensor names of PEFT's methods, and of LoRA in diffusers
OF_PEFT = re.compile(
    r"\.(lora_|hada_w|lokr_|oft_|boft_|ia3_l|vera_|randlora_|hra_|vblora_|fourierft_|waveft_|"
    r"base_layer\.|modules_to_save\.|original_module\.)"
    r"|\.((gralora|delora|poly_lora|hira|hira_embedding|lily|adamss)_[AB]|delora_lambda|tinylora_v|"
    r"unilora_theta_d|glora_[A-E]|psoft_R|deft_[PR]|shira_weight|c3a_kernel|miss_block|"
    r"road_(theta|alpha)|(pvera|frod)_lambda)(?![a-z])"
    r"|[._]lora\d*\.(down|up)\.|^prompt_embeddings$"
)

# the last layers of transformers' classifiers
LAST = ("classifier", "score", "out_proj", "logits_proj", "summary")


def resolve_adapters(
    given: Sequence[Any], module: Any, key: str | None
) -> tuple[list[Any], ModuleSource | None]:
    """The input with adapters opened on their base, and the architecture."""
    folders = {i: found for i, item in enumerate(given) if (found := _adapter_folder(item))}
    models = {i: item for i, item in enumerate(given) if is_peft_model(item)}
    if not folders and not models:
        return list(given), find_architecture(given, module, key)
    configs = {i: PeftConfig.read(folder) for i, folder in folders.items()}
    base, architecture = _base(configs, folders, models, module)
    opened = list(given)
    for i, folder in folders.items():
        opened[i] = open_adapter(folder, configs[i], base)
    for i, model in models.items():
        opened[i] = adapter_in_memory(model, base, f"checkpoint {i} (in memory)")
    for i in [*folders, *models]:
        if missing := base.missing(opened[i].header):
            raise CheckpointError(
                f"{opened[i]!r} can't be opened as a LoRA adapter: neither it nor {base!r} has "
                f"{', '.join(map(repr, missing[:3]))}{', ...' if len(missing) > 3 else ''}"
                f"{_why_missing(missing, base)}."
            )
    in_memory = [PeftConfig("", opened[i].config.fields) for i in models]
    _warn_of_other_bases([*configs.values(), *in_memory], base)
    _warn_of_quantized(configs, base)
    return opened, architecture


def _why_missing(missing: Iterable[str], base: BaseModel) -> str:
    if base.varying.issuperset(missing):
        return (
            ": module= initializes it differently each time it is called, or is a PeftModel that "
            "has trained it in place. Pass the pretrained network, as it was before"
        )
    return (
        ". Save the adapters with it (peft: modules_to_save), or pass the network that has it: "
        "module=build_base"
    )


def _adapter_folder(item: Any) -> Path | None:
    """The PEFT folder that a path is, or whose weights it is."""
    if not isinstance(item, (str, os.PathLike)):
        return None
    return adapter_folder(Path(os.path.expanduser(item)).absolute())


def _base(
    configs: dict[int, PeftConfig], folders: dict[int, Path], models: dict[int, Any], module: Any
) -> tuple[BaseModel, ModuleSource]:
    """The base that was passed, or that of the first model in memory, or the named folder."""
    wrapped = {-1: module} if is_peft_model(module) else models if module is None else {}
    for i, model in wrapped.items():
        network, changed = unwrapped(model, "module=" if i < 0 else f"checkpoint {i} (in memory)")
        return base_of_module(network, changed), network
    named = find_architecture([], module)  # None if nothing was passed
    is_path = isinstance(module, (str, os.PathLike)) and bool(configs)  # they contain the task
    if named is not None and not is_path:
        if isinstance(named, HubModule):
            return base_of_folder(named.path, named), named
        return base_of_module(named), named
    if isinstance(named, HubModule):
        folder, path = named.folder, named.path
    else:
        folder = path = _one_base(configs, folders)
    i, config = next(iter(configs.items()))
    task = config.fields.get("task_type")
    task = task if isinstance(task, str) and task in AUTO_CLASSES else None
    header = open_checkpoint(folders[i]).header
    factory = HubModule(folder, path, task=task, n_labels=_n_labels(header, task))
    return base_of_folder(path, factory), factory


def _one_base(configs: dict[int, PeftConfig], folders: dict[int, Path]) -> Path:
    """The folder of the base that all configurations name."""
    found: dict[str, tuple[int, Path]] = {}
    for i, config in configs.items():
        base = _named_base(config)
        if base is None:
            raise CheckpointError(
                f"{str(folders[i])!r} is an adapter of {config.base_model or 'an unnamed base'!r}, "
                f"which is not on this machine, and sksoup does not download it. Pass the base: "
                f"module=build_base, an nn.Module, or the path of its folder."
            )
        found.setdefault(real_path(base), (i, base))
    (first, base), *others = found.values()
    if others:
        other, its_base = others[0]
        raise CheckpointError(
            f"{str(folders[other])!r} can't join {str(folders[first])!r}: it is an adapter of "
            f"{str(its_base)!r}, but the other one is an adapter of {str(base)!r}. Open only "
            f"adapters of the same base together; if the two folders hold the same model, pass it: "
            f"module={str(base)!r}."
        )
    return base


def _named_base(config: PeftConfig) -> Path | None:
    return find_base_folder(config.base_model, config.fields.get("revision"))


def _warn_of_other_bases(configs: Iterable[PeftConfig], base: BaseModel) -> None:
    """Warn if adapters of differently named bases are opened on the base that was passed."""
    named: dict[Any, str] = {}
    for config in configs:
        if config.base_model:
            found = _named_base(config)
            is_at = (config.base_model, repr(config.fields.get("revision")))
            named.setdefault(is_at if found is None else real_path(found), config.base_model)
    if len(named) > 1:
        listed = ", ".join(repr(name) for name in [*named.values()][:3])
        warnings.warn(
            f"These adapters name several bases ({listed}{', ...' if len(named) > 3 else ''}) and "
            f"are all added to {base!r}. If they were trained on different models, mix only those "
            f"of each alone.",
            SoupWarning,
            stacklevel=4,
        )


def _n_labels(header: Mapping[str, TensorInfo], task: str | None) -> int | None:
    """The number of outputs of a classifier in an adapter: that of its last matrix.

    Found by its name, and because the matrices before it are usually square.
    """
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    matrices = {
        name.removesuffix(".weight").rpartition(".")[2]: info.shape
        for name, info in sorted(header.items())
        if name.endswith(".weight") and len(info.shape) == 2 and not OF_PEFT.search(name)
    }
    wide = {name: shape for name, shape in matrices.items() if shape[0] != shape[1]}
    for some in (wide, matrices):
        if known := [shape for name, shape in some.items() if name in LAST]:
            return known[-1][0]
    for some in (wide, matrices):
        if some:
            return next(reversed(some.values()))[0]
    return None


def _warn_of_quantized(configs: dict[int, PeftConfig], base: BaseModel) -> None:
    packed = sorted({c.base_model for c in configs.values() if c.is_of_quantized_base})
    if packed:
        warnings.warn(
            f"These adapters were trained on {packed[0]!r}, a base with quantized weights, but are "
            f"added to {base!r} in full precision. Compare scores before you rely on the soup.",
            SoupWarning,
            stacklevel=4,
        )


def refuse_factors(entry: Entry) -> None:
    """Raise an error for a bare file or state dict with PEFT tensors."""
    if isinstance(entry.checkpoint, AdapterCheckpoint):
        return
    found = next((name for name in entry.header if OF_PEFT.search(name)), None)
    if found is not None:
        raise CheckpointError(
            f"{entry!r} holds {found!r}, a factor of a PEFT adapter, and the product of averaged "
            f"factors is not the average of the products. Pass the folder that peft's "
            f"save_pretrained writes, with {CONFIG}, and module=base; or merge the adapter (peft: "
            f"model.merge_and_unload())."
        )
