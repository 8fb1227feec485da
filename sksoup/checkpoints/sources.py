"""Where checkpoints come from: files, folders, modules, nets; and the architecture they tell."""

from __future__ import annotations

import copy
import glob
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..exceptions import CheckpointError
from .hub import HubModule, hub_folder
from .read import (
    FOLDER_WEIGHTS,
    SUFFIXES,
    Read,
    TensorInfo,
    check_state_dict,
    list_weights,
    open_weights,
)

PREFIXES = ("module.", "_orig_mod.", "model.")  # DDP, torch.compile, Lightning
ModuleSource: TypeAlias = nn.Module | Callable[[], nn.Module]


class FileCheckpoint:
    """A checkpoint on disk: a path, its header, and the prefix its names carry in the file."""

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.key = key
        self.weights = open_weights(path, key)
        self.is_told = False  # the prefix
        self.strip("")

    def __repr__(self) -> str:
        return repr(str(self.path))

    def strip(self, prefix: str) -> None:
        """Take the tensors whose names in the file begin with this, and leave it out."""
        self.prefix = prefix
        self.header = stripped(self.weights.header, prefix)

    def name(self, depth: int, suffix: bool) -> str:
        """Stem after ``depth`` - 1 folders; a file all such folders have goes by its folder."""
        path = self.path
        if path.is_file() and path.name in FOLDER_WEIGHTS:
            path = path.parent
        last = path.name if suffix or path.is_dir() else path.stem
        return "/".join([*path.parent.parts[1:], last][-depth:])

    @contextmanager
    def open(self) -> Iterator[Read]:
        with self.weights.open() as read:
            yield lambda name: read(self.prefix + name)

    def sha256(self) -> str:
        return self.weights.sha256()

    def identity(self) -> tuple[Any, ...]:
        """What tells this checkpoint from one that took its place, without reading it."""
        files = [(i.size, i.mtime_ns, i.inode) for i in self.weights.identities()]
        return (self.prefix, self.key, files)


class MemoryCheckpoint:
    """A checkpoint in memory: a private copy of a state dict."""

    def __init__(self, state: Mapping[str, torch.Tensor], label: str) -> None:
        self.tensors = {
            name: value.detach().cpu().clone()
            for name, value in check_state_dict(state, label).items()
        }
        self.label = label
        self.is_told = False  # the prefix
        self.strip("")

    def __repr__(self) -> str:
        return self.label

    def strip(self, prefix: str) -> None:
        """Take the tensors whose names begin with this, and leave it out."""
        self.prefix = prefix
        header = {n: TensorInfo(tuple(v.shape), v.dtype) for n, v in self.tensors.items()}
        self.header = stripped(header, prefix)

    @contextmanager
    def open(self) -> Iterator[Read]:
        yield lambda name: self.tensors[self.prefix + name]

    def sha256(self) -> str:
        return content_sha256(self)


def stripped(header: dict[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    if not prefix:
        return header
    return {n[len(prefix) :]: info for n, info in header.items() if n.startswith(prefix)}


Checkpoint: TypeAlias = FileCheckpoint | MemoryCheckpoint


def open_source(item: Any, index: int, key: str | None) -> Checkpoint:
    """A checkpoint from what the user gave: a path, a module, a net, a state dict."""
    if isinstance(item, FileCheckpoint) and key not in (None, item.key):
        return FileCheckpoint(item.path, key)
    if isinstance(item, (FileCheckpoint, MemoryCheckpoint)):  # of another collection
        return copy.copy(item)
    if isinstance(item, (str, os.PathLike)):
        return FileCheckpoint(Path(item).absolute(), key)
    if isinstance(trained := getattr(item, "module_", None), nn.Module):  # a fitted skorch net
        item = trained
    if isinstance(item, nn.Module):
        item = item.state_dict()
    if isinstance(item, Mapping):
        return MemoryCheckpoint(item, f"checkpoint {index} (in memory)")
    raise TypeError(
        f"checkpoints[{index}] is a {type(item).__name__}, expected a path, an nn.Module, a fitted "
        f"skorch net or a state dict."
    )


class _SkorchModule:
    """The architecture of a skorch net: an initialised copy's module."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self) -> nn.Module:
        module: nn.Module = copy.deepcopy(self.net).initialize().module_
        return module


def find_architecture(given: Sequence[Any], module: Any) -> ModuleSource | None:
    """The module or factory to build from: as given, else the first that the checkpoints know."""
    for item in [module] if module is not None else given:
        trained = getattr(item, "module_", None)
        if isinstance(item, nn.Module) or isinstance(trained, nn.Module):
            return copy.deepcopy(item if isinstance(item, nn.Module) else trained)
        if module is None:
            if isinstance(item, (str, os.PathLike)) and (folder := hub_folder(Path(item))):
                return HubModule(folder)
        elif hasattr(item, "initialize") and hasattr(item, "get_params"):
            return _SkorchModule(item)
        elif callable(item):
            factory: ModuleSource = item
            return factory
        else:
            raise TypeError(
                f"module must be a factory without arguments, an nn.Module or a skorch net, got "
                f"{type(item).__name__}."
            )
    return None


def find_checkpoints(path: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a folder or a pattern, or a file, in natural order."""
    root = Path(path)
    if root.is_dir():
        found = list_weights(root)
    elif root.is_file():
        found = [root]
    else:
        found = [Path(p) for p in glob.glob(os.fspath(path), recursive=True)]
    if not found:
        raise CheckpointError(
            f"No checkpoints found at {os.fspath(path)!r}: expected a folder with "
            f"{', '.join(SUFFIXES)} files, a pattern that matches some, or a file."
        )
    return sorted(found, key=natural_key)


def take_prefix(entries: Sequence[Checkpoint], prefix: str) -> None:
    """Take the tensors whose names begin with this; it is an error where none does."""
    for entry in entries:
        entry.strip("")
        names = list(entry.header)
        entry.strip(prefix)
        entry.is_told = True
        if not entry.header:
            raise CheckpointError(
                f"{entry!r} can't be opened with prefix={prefix!r}: no name in it begins so. Its "
                f"names are {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}."
            )


def drop_prefixes(entries: Sequence[Checkpoint], module: ModuleSource | None) -> None:
    """Drop DDP's, compile's and Lightning's prefixes where that is what makes the names fit.

    Those of another collection are chosen anew, unless the user has told them.
    """
    if any(entry.is_told for entry in entries):
        return
    for entry in entries:
        if entry.prefix:
            entry.strip("")
    if any(len(_prefixes(list(entry.header))) > 1 for entry in entries):
        fit_names(entries, _module_names(module))


def fit_names(entries: Sequence[Checkpoint], wanted: set[str] | None) -> None:
    """Drop the prefixes that make the names those wanted, or else each other's."""
    choices = [_prefixes(list(entry.header)) for entry in entries]
    if wanted is not None:
        for entry, prefixes in zip(entries, choices, strict=True):
            names = list(entry.header)
            fits = (p for p in prefixes if {name[len(p) :] for name in names} <= wanted)
            entry.strip(next(fits, ""))
        return
    offers = [
        {frozenset(name[len(p) :] for name in entry.header): p for p in reversed(prefixes)}
        for entry, prefixes in zip(entries, choices, strict=True)
    ]
    shared = next((names for names in reversed(offers[0]) if all(names in o for o in offers)), None)
    if shared is not None:
        for entry, offer in zip(entries, offers, strict=True):
            entry.strip(offer[shared])


def _prefixes(names: Sequence[str]) -> list[str]:
    """Every chain of known prefixes that all names begin with, the empty one first."""
    found = [""]
    while True:
        longer = next(
            (found[-1] + p for p in PREFIXES if all(n.startswith(found[-1] + p) for n in names)),
            None,
        )
        if longer is None:
            return found
        found.append(longer)


def _module_names(module: ModuleSource | None) -> set[str] | None:
    """Names in the module's state dict, built on 'meta': no memory, no initialisation."""
    if module is None or isinstance(module, nn.Module):
        return None if module is None else set(module.state_dict())
    try:
        with preserved_random_state(), torch.device("meta"):
            return set(module().state_dict())
    except Exception:  # a factory that can't be built so is built for real later
        return None


def content_sha256(entry: Checkpoint) -> str:
    """SHA-256 of names, dtypes, shapes and values: the same in memory and in any file."""
    digest = sha256()
    with entry.open() as read:
        for name, info in sorted(entry.header.items()):
            digest.update(f"{name}:{info.dtype}:{info.shape};".encode())
            digest.update(read(name).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def default_names(entries: Sequence[Checkpoint]) -> tuple[str, ...]:
    """File stems; with suffixes, then folders, where these repeat; checkpoint0, ... in memory."""
    deepest = max((len(e.path.parts) for e in entries if isinstance(e, FileCheckpoint)), default=1)
    for depth in range(1, deepest + 1):
        for suffix in (False, True):
            names = tuple(
                entry.name(depth, suffix)
                if isinstance(entry, FileCheckpoint)
                else f"checkpoint{index}"
                for index, entry in enumerate(entries)
            )
            if len(set(names)) == len(names):
                return names
    # the same file more than once
    return tuple(f"{n}#{i}" if names.count(n) > 1 else n for i, n in enumerate(names))


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort digits by value: ft2 before ft10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave torch's, numpy's and Python's global random state as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
