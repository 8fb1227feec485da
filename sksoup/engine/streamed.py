"""Deltas of more models than memory holds: each operation reads all the files once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .deltas import ModelBatch


class StreamedBatch(ModelBatch):
    """The deltas of all the models loaded, of which ``capacity`` are in memory at a time."""

    _names: Sequence[str] = ()

    def load(self, names: Sequence[str]) -> None:
        """Note the names: the operations read the files."""
        self._names = names

    def _parts(self) -> Iterator[slice]:
        """Load as many models at a time as there is room for; give which."""
        for start in range(0, len(self._names), self.capacity):
            part = slice(start, start + self.capacity)
            super().load(self._names[part])
            yield part

    def add(self, base: torch.Tensor | None, coef: torch.Tensor) -> None:
        for part in self._parts():
            super().add(base, coef[part])
            base = None

    def project(self) -> torch.Tensor:
        return torch.cat([ModelBatch.project(self) for _ in self._parts()])

    def norms(self) -> torch.Tensor:
        return torch.cat([ModelBatch.norms(self) for _ in self._parts()])
