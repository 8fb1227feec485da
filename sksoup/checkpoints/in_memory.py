"""State dicts in memory, copied to the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from ..exceptions import CheckpointError
from ..runtime.fingerprint import tensor_bytes
from .pickles import kind_of
from .protocol import HASHING, Checkpoint, Entry, Read, TensorInfo, end_if_stopped, is_text
from .read import SAFETENSORS_DTYPES


class MemoryCheckpoint(Checkpoint):
    """A private copy of a state dict."""

    shares_memory = True

    def __init__(self, state: Mapping[str, torch.Tensor], label: str) -> None:
        given = check_state_dict(state, label)
        if empty := [name for name, value in given.items() if value.is_meta]:
            raise CheckpointError(
                f"{label} can't be used: {empty[0]!r} is on the device 'meta', where tensors have "
                f"no values. Load the weights first."
            )
        for name, value in given.items():
            if value.dtype not in SAFETENSORS_DTYPES.values() and not value.is_complex():
                raise CheckpointError(
                    f"{label} can't be used: {name!r} has dtype {value.dtype}, expected one of "
                    f"{', '.join(map(str, SAFETENSORS_DTYPES.values()))}. Convert it."
                )
        once = {place_of(value): value for value in given.values()}  # tied weights are copied once
        copies = {
            place: value.detach().resolve_neg().cpu().clone() for place, value in once.items()
        }
        self.tensors = {name: copies[place_of(value)] for name, value in given.items()}
        self.label = label
        self.header = {name: TensorInfo.of(value) for name, value in self.tensors.items()}
        self._digests: dict[str, str] = {}

    def __repr__(self) -> str:
        return self.label

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Yield a function that returns the tensors themselves."""
        yield self.tensors.__getitem__

    def identity(self) -> tuple[Any, ...]:
        """Its digest."""
        return (self.sha256(),)

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of names (without the prefix) and values."""
        with HASHING:
            if prefix not in self._digests:
                self._digests[prefix] = content_sha256(Entry(self, prefix))
        return self._digests[prefix]

    def held_tensors(self) -> Iterable[torch.Tensor]:
        """All tensors; do not write to them."""
        return self.tensors.values()


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's values are: equal only for several names of one tensor."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter)  # others may have no address
    if not is_plain or not tensor.data_ptr():
        return (id(tensor),)
    where = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.is_neg()
    return (*where, tensor.shape, tensor.stride())


def content_sha256(entry: Entry) -> str:
    """SHA-256 of names, dtypes, shapes and values: the same in memory and in any file."""
    with entry.checkpoint.open() as read:
        return digest_of(entry.header, lambda name: read(entry.prefix + name))


def digest_of(header: Mapping[str, TensorInfo], read: Read) -> str:
    """SHA-256 of the names, dtypes, shapes and values of these tensors."""
    digest = sha256()
    if any(mark in name for name in header for mark in "\0:;"):  # could be taken for the values
        digest.update(f"\0{sorted((n, str(i.dtype), i.shape) for n, i in header.items())}".encode())
    for name, info in sorted(header.items()):
        digest.update(f"{name}:{info.dtype}:{info.shape};".encode())
        digest.update(tensor_bytes(read(name)))
        end_if_stopped()
    return digest.hexdigest()


def check_state_dict(state: Any, where: str) -> dict[str, torch.Tensor]:
    """Return ``state`` if it is a mapping of names to dense tensors; raise an error if not."""
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{where} holds a {kind_of(state)}, expected a state dict (tensor name -> "
            f"tensor). Save module.state_dict()."
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            # the name may be any object, and its repr may be long
            what = repr(name) if isinstance(name, str) else f"a name of type {kind_of(name)}"
            raise CheckpointError(
                f"{where} is not a plain state dict: {what} is a {kind_of(value)}, expected "
                f"a tensor. Save only module.state_dict()."
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise CheckpointError(
                f"{where} can't be used: {name!r} is a sparse, quantized or nested tensor, "
                f"expected a dense one."
            )
        if not is_text(name):
            raise CheckpointError(
                f"{where} can't be used: the name {name!r} is not valid Unicode and can't be "
                f"written to a file. Rename the tensor."
            )
    return dict(state)
