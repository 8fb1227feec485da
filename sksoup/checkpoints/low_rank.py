"""Checkpoints that are a base and something of low rank: what they add to it, without the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .protocol import Checkpoint, Read

BLOCK = 1 << 22  # numbers of a product that are computed at a time


@dataclass(frozen=True)
class Factors:
    """A difference from the base, ``left @ right``, in the shape of its tensor when reshaped."""

    left: torch.Tensor  # (m, r), any scale included
    right: torch.Tensor  # (r, n)

    @property
    def rank(self) -> int:
        return len(self.right)

    def is_finite(self) -> bool:
        """Whether both factors hold finite numbers only."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    def add_to(self, sums: torch.Tensor, c: float = 1.0) -> None:
        """Sums += c * (left @ right), the product rounded from float64, in place.

        In float64 the product hardly ever depends on how a processor orders its sums.
        """
        if not c:
            return
        rows = sums.view(len(self.left), -1)
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


# gives the factors of a tensor, or None where it is the base's or held whole
ReadFactors: TypeAlias = Callable[[str], Factors | None]


class BaseCheckpoint(Checkpoint):
    """What others add to."""

    def content_sha256(self, without: Iterable[str] = ()) -> str:
        """SHA-256 of names and values, without some tensors."""
        raise NotImplementedError


class LowRankCheckpoint(Checkpoint):
    """A checkpoint that is computed: a base, products of factors, and tensors of its own.

    ``ranks`` has the tensors that differ by a product, ``whole`` those that it holds itself; all
    others are the base's.
    """

    base: BaseCheckpoint
    ranks: Mapping[str, int]
    whole: frozenset[str]

    def open_factors(self) -> AbstractContextManager[tuple[ReadFactors, Read]]:
        """Give what reads factors, and what reads whole tensors, without the base."""
        raise NotImplementedError

    def content_sha256(self) -> str:
        """SHA-256 of what it holds itself, the same in memory and in a file."""
        raise NotImplementedError

    def adds(self, name: str) -> bool:
        """Whether a tensor is not simply the base's."""
        return name in self.ranks or name in self.whole

    @property
    def n_numbers(self) -> int:
        """Numbers in its factors and in its own tensors."""
        shapes = {name: self.header[name].shape for name in self.ranks}
        factors = sum(
            rank * (shapes[name][0] + math.prod(shapes[name][1:]))
            for name, rank in self.ranks.items()
        )
        return factors + sum(self.header[name].size for name in self.whole)
