"""What a checkpoint is: named tensors, their shapes without a read, their values one at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import torch

Read: TypeAlias = Callable[[str], torch.Tensor]
HASHING = threading.Lock()  # so that nothing is hashed twice at once


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def is_floating(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def rows(self, where: slice | None) -> TensorInfo:
        """Of some rows; None is all."""
        if where is None:
            return self
        n = len(range(*where.indices(self.shape[0])))
        return TensorInfo((n, *self.shape[1:]), self.dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same dtype and bits (NaN equals itself)."""
    if a.dtype != b.dtype:
        return False
    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@runtime_checkable
class Checkpoint(Protocol):
    """One network's weights, in a file or computed; a collection takes any such object as it is.

    A subclass inherits what holds for a checkpoint without a file and without tensors in memory.
    A format of files is added to ``sources.KINDS``, too. Names are those of the file.
    """

    header: Mapping[str, TensorInfo]  # of every tensor, without reading any
    path: Path | None = None  # of its file or folder
    key: str | None = None  # which state dict of a container it is, where that was given

    def open(self) -> AbstractContextManager[Read]:
        """Give ``read(name) -> tensor``, on the CPU; perhaps a view of a file: use it promptly."""
        raise NotImplementedError

    def open_rows(self, rows: Mapping[str, slice]) -> AbstractContextManager[Read]:
        """Give what reads no more than these rows of the tensors named, all of the others."""
        return _cut(self.open(), rows)

    def identity(self) -> tuple[Any, ...]:
        """What distinguishes it from one that took its place, without reading it."""
        raise NotImplementedError

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of its files; without any, `content_sha256` of what is behind the prefix."""
        raise NotImplementedError

    def warm(self) -> None:
        """Have the operating system read it into its cache, if it can."""
        return

    def held_tensors(self) -> Iterable[torch.Tensor]:
        """The tensors that it keeps in memory."""
        return ()


@contextmanager
def _cut(opened: AbstractContextManager[Read], rows: Mapping[str, slice]) -> Iterator[Read]:
    with opened as read:
        yield lambda name: read(name)[rows[name]] if name in rows else read(name)


@dataclass(frozen=True)
class Entry:
    """A checkpoint in a collection: the tensors whose names begin with a prefix, without it."""

    checkpoint: Checkpoint
    prefix: str = ""
    is_given: bool = False  # the prefix, by the user
    header: Mapping[str, TensorInfo] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n, header = len(self.prefix), self.checkpoint.header
        stripped = {name[n:]: i for name, i in header.items() if name.startswith(self.prefix)}
        object.__setattr__(self, "header", stripped if n else header)

    def __repr__(self) -> str:
        return repr(self.checkpoint)
