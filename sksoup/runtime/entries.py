"""An entry of the cache: a value as a safetensors file, with a digest of the value and its key."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .fingerprint import fingerprint

SUFFIX = ".entry"  # not of a checkpoint, so that folders of both can be opened
MOST_BYTES = 2**30  # an entry has a few kB; a larger file is none


def pack(value: Any, key: str) -> bytes:
    """Tensors, numbers, texts, and lists, tuples and dicts of them as bytes; no code.

    Tensors are those of the file; all else is JSON in its metadata, beside a digest of everything
    and the key.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_to_json(value, tensors))
    metadata = {"value": text, "sha256": fingerprint(key, text, tensors)}
    return save(tensors, metadata)


def unpack(data: bytes, key: str) -> Any:
    """The value that `pack` gave this key; a ValueError for anything else."""
    try:
        tensors = load(data)  # first: it refuses headers of more than 100 MB
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        text, digest = metadata["value"], metadata["sha256"]
        if fingerprint(key, text, tensors) == digest:
            return _from_json(json.loads(text), tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ValueError(f"it is not a whole entry: {type(error).__name__}: {error}") from error
    raise ValueError("it was changed, or belongs to another key")


def _to_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON; its tensors are moved to the dict."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_to_json(part, tensors) for part in value]}
    if isinstance(value, dict):
        pairs = [[_to_json(k, tensors), _to_json(part, tensors)] for k, part in value.items()]
        return {"dict": pairs}
    raise TypeError(f"an entry can't hold a {type(value).__name__}")


def _from_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `_to_json` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_from_json(k, tensors): _from_json(part, tensors) for k, part in content}
    parts = [_from_json(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts


def write_entry(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all.

    It is not forced to the disk: a machine that fails leaves a damaged entry, which is computed
    again.
    """
    temporary = path.with_name(f".{secrets.token_hex(16)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def without_waiting(path: str, flags: int) -> int:
    """Open a file, but do not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_entry(path: Path) -> bytes:
    """Read a file of a size that an entry can have; a pipe or a device has none, nor an end."""
    with open(path, "rb", opener=without_waiting) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        return file.read(size)
