"""Some rows of every tensor of a checkpoint: the part of a sharded model on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .protocol import Checkpoint, Entry, Read


class SlicedCheckpoint(Checkpoint):
    """Rows of the tensors of another checkpoint; tensors without an entry are whole.

    Its file and its digest are those of the other checkpoint.
    """

    def __init__(self, entry: Entry, rows: Mapping[str, slice]) -> None:
        self._entry = entry
        self._rows = {entry.prefix + name: where for name, where in rows.items()}
        self.path, self.key = entry.checkpoint.path, entry.checkpoint.key
        self.header = {name: info.rows(rows.get(name)) for name, info in entry.header.items()}

    def __repr__(self) -> str:
        return repr(self._entry)

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Read the rows; from a safetensors file nothing else is read."""
        with self._entry.checkpoint.open_rows(self._rows) as read:
            yield lambda name: read(self._entry.prefix + name)

    def identity(self) -> tuple[Any, ...]:
        """That of the checkpoint, with the names that are left out."""
        entry = self._entry
        return (entry.prefix, *sorted(entry.without), *entry.checkpoint.identity())

    def sha256(self, prefix: str = "") -> str:
        """That of the checkpoint."""
        return self._entry.checkpoint.sha256(self._entry.prefix)

    def warm(self) -> None:
        """Do nothing: the system would read the rows of all ranks."""

    def held_tensors(self) -> Iterable[torch.Tensor]:
        """Those of the checkpoint."""
        return self._entry.checkpoint.held_tensors()
