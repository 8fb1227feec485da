"""Deltas of more models than memory holds: each operation reads all the files once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .deltas import ModelBatch


class StreamedModels:
    """The deltas of all the models loaded, as many at a time as ``batch`` has room for."""

    def __init__(self, batch: ModelBatch) -> None:
        self.flat = batch.flat
        self._batch = batch
        self._names: Sequence[str] = ()

    def load(self, names: Sequence[str]) -> None:
        """Note the names: reading is for the operations."""
        self._names = names

    def _parts(self) -> Iterator[slice]:
        """Load as many models at a time as there is room for; give which."""
        step = self._batch.capacity
        for start in range(0, len(self._names), step):
            part = slice(start, start + step)
            self._batch.load(self._names[part])
            yield part

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """As `ModelBatch.combine`; coef is (K, n_searched)."""
        self.flat.weights.copy_(self._batch.start)
        for part in self._parts():
            self._batch.add(self.flat.weights, coef[part])
        for variance in self.flat.variances:
            variance.clamp_(min=0)

    def project(self) -> torch.Tensor:
        """As `ModelBatch.project`: (K, n_searched)."""
        return torch.cat([self._batch.project() for _ in self._parts()])

    def norms(self) -> torch.Tensor:
        """As `ModelBatch.norms`: (K, n_searched)."""
        return torch.cat([self._batch.norms() for _ in self._parts()])

    def commit(self, coef: torch.Tensor) -> None:
        """As `ModelBatch.commit`."""
        self.combine(coef)
        self._batch.start.copy_(self.flat.weights)
