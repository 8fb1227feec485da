"""What users have (files, folders, modules, nets, state dicts) -> checkpoints, with names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..exceptions import CheckpointError
from .folders import FOLDER_WEIGHTS, list_weights, weights_of
from .in_memory import MemoryCheckpoint
from .protocol import Checkpoint, Entry
from .read import SafetensorsFile
from .shards import ShardedCheckpoint
from .torch_files import TorchFile

# the formats of files: the first that accepts a file opens it
KINDS = (ShardedCheckpoint, SafetensorsFile, TorchFile)
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind.suffixes)


def open_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Read the header of a checkpoint: a file, an index of shards, or a folder with either."""
    file = weights_of(path) if path.is_dir() else path
    for kind in KINDS:
        if kind.accepts(file):
            return kind(file, key, path)
    raise CheckpointError(
        f"{str(path)!r} is not a checkpoint sksoup reads: got the suffix {path.suffix!r}, "
        f"expected one of {', '.join(SUFFIXES)}."
    )


def open_source(item: Any, index: int, key: str | None) -> Entry:
    """A checkpoint from a path, a module, a net, a state dict, or as it is; not an empty one."""
    entry = _entry(item, index, key)
    if not entry.checkpoint.header:
        raise CheckpointError(
            f"{entry!r} holds no tensors, expected a state dict (tensor name -> tensor)."
        )
    return entry


def _entry(item: Any, index: int, key: str | None) -> Entry:
    if isinstance(item, Checkpoint):
        return Entry(item)
    if isinstance(item, Entry):  # of another collection
        found = item.checkpoint
        if key in (None, found.key) or found.path is None:
            return item
        return Entry(open_checkpoint(found.path, key))
    if isinstance(item, (str, os.PathLike)):
        return Entry(open_checkpoint(Path(item).absolute(), key))
    if isinstance(trained := getattr(item, "module_", None), nn.Module):  # a fitted skorch net
        item = trained
    if isinstance(item, nn.Module):
        item = item.state_dict()
    if isinstance(item, Mapping):
        return Entry(MemoryCheckpoint(item, f"checkpoint {index} (in memory)"))
    raise TypeError(
        f"checkpoints[{index}] is a {type(item).__name__}, expected a path, an nn.Module, a fitted "
        f"skorch net or a state dict."
    )


def find_checkpoints(path: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a folder or a pattern, or a file, in natural order."""
    root = Path(path)
    if root.is_dir():
        found = list_weights(root, SUFFIXES)
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


def default_names(entries: Sequence[Entry]) -> tuple[str, ...]:
    """File stems; with suffixes, then folders, where these repeat; checkpoint0, ... in memory."""
    paths = [entry.checkpoint.path for entry in entries]
    for depth in range(1, max((len(path.parts) for path in paths if path), default=1) + 1):
        for suffix in (False, True):
            names = tuple(
                f"checkpoint{index}" if path is None else _stem(path, depth, suffix)
                for index, path in enumerate(paths)
            )
            if len(set(names)) == len(names):
                return names
    # the same file more than once
    return tuple(f"{n}#{i}" if names.count(n) > 1 else n for i, n in enumerate(names))


def _stem(path: Path, depth: int, suffix: bool) -> str:
    """Stem after ``depth`` - 1 folders; a file all such folders have goes by its folder."""
    if path.is_file() and path.name in FOLDER_WEIGHTS:
        path = path.parent
    last = path.name if suffix or path.is_dir() else path.stem
    return "/".join([*path.parent.parts[1:], last][-depth:])


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort digits by value: ft2 before ft10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]
