"""Deltas that the ranks of a distributed job share out, where one device can't hold b of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..runtime.distributed import all_reduce, rank, share, world_size
from .center import Center
from .deltas import ModelBatch, Reader


class ShardedBatch(ModelBatch):
    """A model batch of which every rank holds b / world_size deltas; a step sends 2 D numbers."""

    def __init__(
        self,
        center: Center,
        capacity: int,
        delta_dtype: torch.dtype,
        reader: Reader | None = None,
    ) -> None:
        super().__init__(center, -(-capacity // world_size()), delta_dtype, reader)
        self._mine = slice(0)
        self._n_models = 0

    def load(self, names: Sequence[str]) -> None:
        """Read this rank's part of the deltas."""
        self._mine, self._n_models = share(len(names)), len(names)
        super().load(names[self._mine])

    def add(self, base: torch.Tensor, coef: torch.Tensor) -> None:
        """Each rank adds its deltas, rank 0 to the base, and the sum is taken."""
        if rank():
            self.flat.weights.zero_()
        else:
            self.flat.weights.copy_(base)
        super().add(self.flat.weights, coef[self._mine])
        all_reduce(self.flat.weights)

    @torch.no_grad()
    def project(self) -> torch.Tensor:
        """(b, n_searched): rows of this rank's deltas; the sum over the ranks is the projection."""
        all_reduce(self.flat.grad)
        return self._placed(super().project())

    def norms(self) -> torch.Tensor:
        return all_reduce(self._placed(super().norms()))

    def _placed(self, mine: torch.Tensor) -> torch.Tensor:
        """(b, ...) with this rank's rows in their place and zeros elsewhere."""
        everyone = mine.new_zeros((self._n_models, *mine.shape[1:]))
        everyone[self._mine] = mine
        return everyone
