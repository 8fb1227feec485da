"""Checkpoints that add low-rank products to a base, which can be read without the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .protocol import Checkpoint, Read

BLOCK = 1 << 22  # elements of a product that are computed at a time


@dataclass(frozen=True)
class Factors:
    """A difference from the base, ``left @ right``, to be reshaped to its tensor."""

    left: torch.Tensor  # (m, r), including any scale
    right: torch.Tensor  # (r, n)

    @property
    def rank(self) -> int:
        return len(self.right)

    def is_finite(self) -> bool:
        """Whether both factors are finite."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    def add_to(self, sums: torch.Tensor, c: float = 1.0) -> None:
        """Add c * (left @ right) to ``sums`` in place, with the product computed in float64.

        In float64 the result almost never depends on the order in which a processor sums.
        """
        if not c:
            return
        rows = sums.view(len(self.left), self.right.shape[1])
        left, right = self.left.double(), self.right.double()
        step = max(1, BLOCK // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            product = (left[part] @ right).to(sums.dtype)
            rows[part] += product if c == 1.0 else product * c


def widened(w: torch.Tensor) -> torch.Tensor:
    """A copy in the accumulator's dtype: float32, or float64 for float64."""
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    return w.to(dtype, copy=True, memory_format=torch.contiguous_format)


# returns the factors of a tensor, or None if it is the base's or stored as a whole
ReadFactors: TypeAlias = Callable[[str], Factors | None]


class BaseCheckpoint(Checkpoint):
    """The base of low-rank checkpoints."""

    def content_sha256(self, without: Iterable[str] = ()) -> str:
        """SHA-256 of names and values, without some tensors."""
        raise NotImplementedError


class LowRankCheckpoint(Checkpoint):
    """A checkpoint computed from a base, products of factors, and tensors of its own.

    ``ranks`` lists the tensors that differ by a product, ``whole`` those that are stored as a
    whole. All others are the base's.
    """

    base: BaseCheckpoint
    ranks: Mapping[str, int]
    whole: frozenset[str]

    def open_factors(self) -> AbstractContextManager[tuple[ReadFactors, Read]]:
        """Yield functions that read factors and whole tensors, without the base."""
        raise NotImplementedError

    def content_sha256(self) -> str:
        """SHA-256 of its own tensors, the same in memory and in a file."""
        raise NotImplementedError

    def adds(self, name: str) -> bool:
        """Whether a tensor differs from the base."""
        return name in self.ranks or name in self.whole

    @property
    def n_numbers(self) -> int:
        """Number of elements in its factors and its own tensors."""
        shapes = {name: self.header[name].shape for name in self.ranks}
        factors = sum(
            rank * (shapes[name][0] + math.prod(shapes[name][1:]))
            for name, rank in self.ranks.items()
        )
        return factors + sum(self.header[name].size for name in self.whole)
