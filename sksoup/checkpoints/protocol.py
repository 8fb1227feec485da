"""What a checkpoint is: named tensors, their shapes without a read, their values one at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

Read: TypeAlias = Callable[[str], torch.Tensor]
HASHING = threading.Lock()  # so that nothing is hashed twice at once


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_floating(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Checkpoint(Protocol):
    """One network's weights, wherever they are.

    A file format, or a checkpoint that is computed, is a class like this in a file of its own, and
    a line in ``sources.KINDS``. All names are those in the file.
    """

    @property
    def header(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, known without reading any."""

    @property
    def path(self) -> Path | None:
        """Where it lies; None in memory."""

    @property
    def key(self) -> str | None:
        """Which state dict of a container it is, where that was said."""

    def open(self) -> AbstractContextManager[Read]:
        """Give ``read(name) -> tensor``, on the CPU; perhaps a view of a file: use it promptly."""

    def identity(self) -> tuple[Any, ...]:
        """What distinguishes it from one that took its place, without reading it."""

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of its files; in memory of names (without the prefix) and values. Once."""

    def warm(self) -> None:
        """Have the operating system read it into its cache, if it can."""

    def held_tensors(self) -> Iterable[torch.Tensor]:
        """The tensors that it keeps in memory."""


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
