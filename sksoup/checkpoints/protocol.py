"""The interface of a checkpoint: shapes without reading, and values one tensor at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import torch

Read: TypeAlias = Callable[[str], torch.Tensor]
# characters of the name of a tensor; usual ones have about 100, and matching takes quadratic time
LONGEST_NAME = 1000
MOST_DIMENSIONS = 64  # of a tensor in numpy; torch takes quadratic time for more
HASHING = threading.Lock()  # keeps threads from hashing the same file twice
STOP: ContextVar[threading.Event | None] = ContextVar("STOP", default=None)  # of such a thread


def end_if_stopped() -> None:
    """Raise an error in a thread that hashes in the background and was asked to stop."""
    if (stop := STOP.get()) is not None and stop.is_set():
        raise InterruptedError("hashing was stopped")


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
        """The shape and dtype of some rows; None is all of them."""
        if where is None:
            return self
        n = len(range(*where.indices(self.shape[0])))
        return TensorInfo((n, *self.shape[1:]), self.dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of the same shape have the same dtype and bits (NaN equals itself)."""
    if a.dtype != b.dtype:
        return False
    if a.is_complex():
        a, b = (torch.view_as_real(one.resolve_conj()) for one in (a, b))
    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """`same_bits`, after conversion to one dtype if those of floating tensors differ."""
    if a.dtype == b.dtype or not (a.is_floating_point() and b.is_floating_point()):
        return same_bits(a, b)
    wide = torch.promote_types(a.dtype, b.dtype)
    return same_bits(a.to(wide), b.to(wide))


def is_cast(original: torch.Tensor, copy: torch.Tensor) -> bool:
    """Whether a tensor has the values of another in its own dtype, as a model loaded in it has.

    Models are trained in dtypes of 16 bits or more, which have to hold the values.
    """
    are_floats = original.is_floating_point() and copy.is_floating_point()
    if original.dtype == copy.dtype or not are_floats or copy.dtype.itemsize < 2:
        return same_bits(original, copy)
    return bool(torch.isfinite(copy).all()) and same_bits(original.to(copy.dtype), copy)


def is_text(name: str) -> bool:
    """Whether a name can be encoded as UTF-8, that is, has no unpaired surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@runtime_checkable
class Checkpoint(Protocol):
    """The weights of one network, in a file or computed; a collection accepts any such object.

    The defaults are those of a checkpoint without a file and without tensors in memory. A new file
    format must also be added to ``sources.KINDS``. Tensor names are those in the file.
    """

    header: Mapping[str, TensorInfo]  # of every tensor, without reading values
    path: Path | None = None  # its file or folder
    key: str | None = None  # which state dict of the file was selected, if any
    shares_memory: bool = False  # whether several names of one tensor are read as one memory

    def open(self) -> AbstractContextManager[Read]:
        """Yield ``read(name) -> tensor``, on the CPU; it may be a view of the file."""
        raise NotImplementedError

    def open_rows(self, rows: Mapping[str, slice]) -> AbstractContextManager[Read]:
        """Yield a function that reads these rows of the named tensors, and all of the others."""
        return _cut(self.open(), rows)

    def identity(self) -> tuple[Any, ...]:
        """An identity that changes if the checkpoint is replaced; found without reading it."""
        raise NotImplementedError

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of its files; without files, `content_sha256` of the tensors with the prefix."""
        raise NotImplementedError

    def warm(self) -> None:
        """Ask the operating system to read it into its cache, if possible."""
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
    """A checkpoint in a collection: the tensors with a prefix, which is removed from names.

    Names in ``without`` (after the prefix) do not belong to it.
    """

    checkpoint: Checkpoint
    prefix: str = ""
    is_given: bool = False  # whether the user passed the prefix
    without: frozenset[str] = frozenset()
    header: Mapping[str, TensorInfo] = field(init=False, repr=False)
    is_soup: bool = field(init=False, repr=False)  # whether sksoup wrote it, with a recipe
    # the SHA-256 of its content, once it was computed
    digests: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n, header = len(self.prefix), self.checkpoint.header
        if n:
            header = {name[n:]: i for name, i in header.items() if name.startswith(self.prefix)}
        if self.without:
            header = {name: info for name, info in header.items() if name not in self.without}
        object.__setattr__(self, "header", header)
        object.__setattr__(self, "is_soup", getattr(self.checkpoint, "is_soup", False))

    def __repr__(self) -> str:
        return repr(self.checkpoint)
