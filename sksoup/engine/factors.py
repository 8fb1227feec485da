"""The factors of adapters of one base side by side: their products and lengths."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection

MOST_PRODUCTS = 1 << 24  # numbers; of 128 MB


@dataclass
class Stack:
    """One tensor's differences from the base in all adapters: left @ right, columns by adapter."""

    left: torch.Tensor  # (m, R), any scale included
    right: torch.Tensor  # (R, n)
    owner: torch.Tensor  # (R,), place of the adapter that a column of left belongs to

    def to(self, device: torch.device, dtype: torch.dtype) -> Stack:
        """The same elsewhere."""
        return Stack(
            self.left.to(device, dtype), self.right.to(device, dtype), self.owner.to(device)
        )

    def weighted(self, coef: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of sum_k coef_k delta_k; ``coef`` is (K,)."""
        return (self.left * coef[self.owner].to(self.left)).to(dtype), self.right.to(dtype)

    def projected(self, grad: torch.Tensor, n_adapters: int) -> torch.Tensor:
        """(K,): the inner product of a gradient (m, n) with each difference, tr(B^T G A^T)."""
        products = (self.left.to(grad).T @ grad).mul_(self.right.to(grad)).sum(dim=1)  # (R,)
        return products.new_zeros(n_adapters).index_add_(0, self.owner, products)

    def gram(self, n_adapters: int) -> torch.Tensor:
        """(K, K), float64: inner products of the differences, from R x R numbers in blocks.

        Ranks that exceed the size of the tensor would make these more than the differences.
        """
        left, right = self.left.double(), self.right.double()
        if n_adapters * len(left) * right.shape[1] < len(right) ** 2:
            return self._gram_of_products(left, right, n_adapters)
        by_row = left.new_zeros((n_adapters, len(right)))  # (K, R)
        step = max(1, MOST_PRODUCTS // max(1, len(right)))
        for start in range(0, len(right), step):
            part = slice(start, start + step)
            products = (left[:, part].T @ left) * (right[part] @ right.T)  # (step, R)
            by_row.index_add_(0, self.owner[part], products)
        return by_row.new_zeros((n_adapters, n_adapters)).index_add_(1, self.owner, by_row)

    def _gram_of_products(
        self, left: torch.Tensor, right: torch.Tensor, n_adapters: int
    ) -> torch.Tensor:
        """The same from the differences themselves, some rows at a time."""
        columns = [(self.owner == k).nonzero()[:, 0] for k in range(n_adapters)]
        total = left.new_zeros((n_adapters, n_adapters))
        step = max(1, MOST_PRODUCTS // max(1, n_adapters * right.shape[1]))
        for start in range(0, len(left), step):
            some = left[start : start + step]
            rows = torch.stack([(some[:, own] @ right[own]).flatten() for own in columns])
            total += rows @ rows.T
        return total


def read_stacks(checkpoints: CheckpointCollection, names: Collection[str]) -> dict[str, Stack]:
    """The factors of these tensors in all checkpoints, which are adapters of one base."""
    lefts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    rights: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    owners: dict[str, list[int]] = {name: [] for name in names}
    for k, checkpoint in enumerate(checkpoints if names else ()):
        with checkpoints.open_factors(checkpoint) as (read, _):
            for name in names:
                if (both := read(name)) is not None:
                    lefts[name].append(both.left)
                    rights[name].append(both.right)
                    owners[name] += [k] * both.rank
    return {
        name: Stack(
            torch.cat(lefts.pop(name), dim=1),  # one tensor's parts at a time are there twice
            torch.cat(rights.pop(name)),
            torch.tensor(owners[name], dtype=torch.long),
        )
        for name in names
    }


def low_rank_names(checkpoints: CheckpointCollection) -> tuple[set[str], set[str]]:
    """Tensors that differ by products only, and those that some checkpoint holds whole."""
    adapters = checkpoints.on_one_base().values()
    whole = {name for one in adapters for name in one.whole}
    return {name for one in adapters for name in one.ranks} - whole, whole


def measure_stacks(
    checkpoints: CheckpointCollection,
    names: Collection[str],
    q: NDArray[np.float64],
    rows: Mapping[str, int],
    n_rows: int,
) -> NDArray[np.float64]:
    """(K, n_rows): squared lengths of these tensors' parts of w_k - sum_j q_j w_j."""
    squares = np.zeros((len(checkpoints), n_rows))
    for name, stack in read_stacks(checkpoints, names).items():
        squares[:, rows[name]] += squared_lengths(stack, q)
    return squares


def squared_lengths(stack: Stack, q: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,): |delta_k - sum_j q_j delta_j|^2; what is only rounding is 0."""
    gram = stack.gram(len(q)).numpy()
    center = gram @ q
    squares = np.diag(gram) - 2 * center + q @ center
    size = np.diag(gram) + abs(q @ center)
    found: NDArray[np.float64] = np.where(squares > 1e-12 * size, squares, 0.0)
    return found
