"""Adapters among what users give -> checkpoints of one base."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError, SoupWarning
from .adapters import AdapterCheckpoint, adapter_in_memory, is_peft_model, open_adapter, unwrapped
from .architecture import ModuleSource, find_architecture
from .base_model import BaseModel, base_of_folder, base_of_module, find_base_folder
from .hub import AUTO_CLASSES, HubModule
from .peft_config import CONFIG, PeftConfig, is_adapter_folder
from .protocol import Entry
from .sources import open_checkpoint

# what the tensors of PEFT's methods are called
OF_PEFT = re.compile(
    r"\.(lora_|hada_w|lokr_|oft_|boft_|ia3_l|vera_|randlora_|hra_|vblora_|fourierft_|waveft_|"
    r"base_layer\.|modules_to_save\.|original_module\.)|^prompt_embeddings$"
)


def resolve_adapters(
    given: Sequence[Any], module: Any, key: str | None
) -> tuple[list[Any], ModuleSource | None]:
    """What was given, with adapters opened on their base; and the architecture of all."""
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
    _warn_of_quantized(configs, base)
    if module is not None:  # else the names led to one folder
        _warn_of_other_bases(configs, base)
    return opened, architecture


def _why_missing(missing: Iterable[str], base: BaseModel) -> str:
    if base.varying.issuperset(missing):
        return (
            ": module= gives it other values each time it is called, or is a PeftModel that has "
            "trained it in place. Give the pretrained network, as it was before"
        )
    return (
        ". Save the adapters with it (peft: modules_to_save), or give the network that has it: "
        "module=build_base"
    )


def _adapter_folder(item: Any) -> Path | None:
    """The PEFT folder that a path is, or whose weights it is."""
    if not isinstance(item, (str, os.PathLike)):
        return None
    path = Path(os.path.expanduser(item)).absolute()
    if is_adapter_folder(path):
        return path
    is_weights = path.name.startswith("adapter_model.") and is_adapter_folder(path.parent)
    return path.parent if is_weights else None


def _base(
    configs: dict[int, PeftConfig], folders: dict[int, Path], models: dict[int, Any], module: Any
) -> tuple[BaseModel, ModuleSource]:
    """The base as given, else that of the first model in memory, else the folder it is named by."""
    wrapped = {-1: module} if is_peft_model(module) else models if module is None else {}
    for i, model in wrapped.items():
        network, changed = unwrapped(model, "module=" if i < 0 else f"checkpoint {i} (in memory)")
        return base_of_module(network, changed), network
    named = find_architecture([], module)  # None where nothing is given
    is_path = isinstance(module, (str, os.PathLike)) and bool(configs)  # they tell the task
    if named is not None and not is_path:
        if isinstance(named, HubModule):
            return base_of_folder(named.path, named), named
        return base_of_module(named), named
    i, config = next(iter(configs.items()))
    if isinstance(named, HubModule):
        folder, path = named.folder, named.path
    else:
        folder = path = _named_base(configs, folders)
    task = config.fields.get("task_type")
    task = task if isinstance(task, str) and task in AUTO_CLASSES else None
    header = open_checkpoint(folders[i]).header
    factory = HubModule(folder, path, task=task, n_labels=_n_labels(header, task))
    return base_of_folder(path, factory), factory


def _named_base(configs: dict[int, PeftConfig], folders: dict[int, Path]) -> Path:
    """The folder of the base that all of these adapters name."""
    first: tuple[int, Path] | None = None
    known: dict[tuple[str, Any], Path | None] = {}
    for i, config in configs.items():
        name, revision = config.base_model, config.fields.get("revision")
        if (name, repr(revision)) not in known:
            known[name, repr(revision)] = find_base_folder(name, revision)
        found = known[name, repr(revision)]
        if found is None:
            raise CheckpointError(
                f"{str(folders[i])!r} is an adapter of {name or 'an unnamed base'!r}, which is not "
                f"on this machine, and nothing is fetched. Give the base: module=build_base, an "
                f"nn.Module, or the path of its folder."
            )
        if first is None:
            first = i, found
        elif not found.samefile(first[1]):
            raise CheckpointError(
                f"{str(folders[i])!r} is an adapter of {name!r}, and {str(folders[first[0]])!r} of "
                f"{configs[first[0]].base_model!r}: adapters of one base only can be mixed. Leave "
                f"the others out; or, if it is the same network, give it: module=."
            )
    if first is None:
        raise CheckpointError("There is no adapter that names its base: give it, module=.")
    return first[1]


def _n_labels(header: Any, task: str | None) -> int | None:
    """The outputs of a classifier's head that an adapter holds: of its last matrix."""
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [
        info.shape[0]
        for name, info in sorted(header.items())
        if name.endswith(".weight") and len(info.shape) == 2 and not OF_PEFT.search(name)
    ]
    return heads[-1] if heads else None


def _warn_of_quantized(configs: dict[int, PeftConfig], base: BaseModel) -> None:
    packed = sorted({c.base_model for c in configs.values() if c.is_of_quantized_base})
    if packed:
        warnings.warn(
            f"These adapters were trained on {packed[0]!r}, a base with quantized weights, and are "
            f"added to {base!r} in full precision: compare scores before you rely on the soup.",
            SoupWarning,
            stacklevel=4,
        )


def _warn_of_other_bases(configs: dict[int, PeftConfig], base: BaseModel) -> None:
    """Warn where adapters name several bases: shapes alone do not tell them apart."""
    names = {c.base_model.rstrip("/").rpartition("/")[2]: c.base_model for c in configs.values()}
    names.pop("", None)
    if len(names) > 1:
        first, second = list(names.values())[:2]
        warnings.warn(
            f"These adapters name several bases, such as {first!r} and {second!r}, and all are "
            f"added to {base!r}. Mix adapters of one base only.",
            SoupWarning,
            stacklevel=4,
        )


def refuse_factors(entry: Entry) -> None:
    """Refuse a bare file or state dict with tensors of PEFT: a mean of factors is no mean."""
    if isinstance(entry.checkpoint, AdapterCheckpoint):
        return
    found = next((name for name in entry.header if OF_PEFT.search(name)), None)
    if found is not None:
        raise CheckpointError(
            f"{entry!r} holds {found!r}, a part of a PEFT adapter: the mean of factors is not the "
            f"factors of the mean. Give the folder that peft's save_pretrained writes, with "
            f"{CONFIG}, and module=base; or merge the adapter (peft: model.merge_and_unload())."
        )
