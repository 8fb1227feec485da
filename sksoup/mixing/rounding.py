"""Bound on the difference between processors in tensors with LoRA factors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.low_rank import Factors, LowRankCheckpoint, ReadFactors, widened
from ..checkpoints.protocol import Read

MOST_OPEN = 100  # adapters at a time
MOST = 4  # cap on sum_k |c_k|: with larger ones the terms and their rounding cancel out
# cap on all of it, in units of float32 of the result: products and adapters may cancel out, too
MOST_OF_RESULT = 64
STEPS = 4  # units in the last place; 2 if every product is off by one, also with 72 checkpoints


def is_rounding(
    name: str,
    expected: torch.Tensor,
    given: torch.Tensor,
    opened: Opened,
    coef: NDArray[np.float64],
) -> bool:
    """Whether two tensors differ in each number only by rounding.

    ``coef`` is (K,), of the collection that is ``opened``. Another processor may sum a product in
    another order, which may change the last bit of the product, of the sum over the checkpoints
    and of the result. The bound must not grow with K, the coefficients or the factors, since the
    authors of recipes and adapters choose them.
    """
    a, b = expected.double(), given.cpu().double()
    sizes = a.abs()
    bound = torch.finfo(expected.dtype).eps * sizes
    bound += _of_terms(name, opened, coef, sizes + _around(sizes))
    return bool(((a - b).abs() <= bound).all())


def _around(sizes: torch.Tensor) -> torch.Tensor:
    """The median of each number's row or of its column, whichever is smaller, without zeros.

    Not that of the tensor: most rows of an embedding may be of tokens that no text has.
    """
    table = sizes.reshape(len(sizes), -1)
    table = table.masked_fill(table == 0, torch.nan)
    rows, columns = (table.nanmedian(axis, keepdim=True).values for axis in (1, 0))
    return torch.minimum(rows, columns).nan_to_num(0).view(sizes.shape)


def _of_terms(
    name: str, opened: Opened, coef: NDArray[np.float64], usual: torch.Tensor
) -> torch.Tensor:
    """The rounding of the terms |w_0| + |B_k A_k|, and that of the weights as they are stored."""
    checkpoints = opened.checkpoints
    used = {n: abs(c) for n, c in zip(checkpoints.names, coef, strict=True) if c}
    adapters = checkpoints.on_one_base([*used])
    is_on_base = adapters and not any(name in one.whole for one in adapters.values())
    info = checkpoints.layout[name]
    terms, weights = _Sizes(info.shape), _Sizes(info.shape)
    wide = torch.float64 if info.dtype == torch.float64 else torch.float32
    eps = STEPS * torch.finfo(wide).eps
    known = checkpoints.adapters(used)
    for checkpoint, c in used.items():
        if (one := known.get(checkpoint)) is None:
            with checkpoints.open(checkpoint) as read:
                weight = term = read(name).double().abs()
        else:
            read_base, factors, read_whole = opened(checkpoint, one)
            value = read_whole(name) if name in one.whole else read_base(name)
            weight = term = value.double().abs()
            if name not in one.whole and (both := factors(name)) is not None:
                both.add_to(stored := widened(value))
                weight = stored.to(value.dtype).double().abs()
                term = term + _of_product(both, eps).view(term.shape)
        terms.add(term, c)
        weights.add(weight, c)
    most = MOST_OF_RESULT * torch.finfo(torch.float32).eps * usual
    bound = torch.minimum(eps * terms.bounded(), most)
    if not is_on_base:  # if whole models are mixed, each is rounded as stored
        most = MOST * torch.finfo(info.dtype).eps * usual
        bound += torch.minimum(torch.finfo(info.dtype).eps * weights.bounded(), most)
    return bound


def _of_product(both: Factors, eps: float) -> torch.Tensor:
    """|B A|, which is rounded by ``eps``, and what the order of its sum in float64 adds to that."""
    left, right = both.left.double(), both.right.double()
    of_order = both.rank * torch.finfo(torch.float64).eps * (left.abs() @ right.abs())
    return (left @ right).abs() + of_order / eps


class _Sizes:
    """Sum_k |c_k| t_k, which is at most `MOST` times the largest t_k."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.largest = torch.zeros_like(self.total)

    def add(self, term: torch.Tensor, c: float) -> None:
        self.total += c * term
        self.largest = torch.maximum(self.largest, term)

    def bounded(self) -> torch.Tensor:
        return torch.minimum(self.total, MOST * self.largest)


class Opened:
    """Readers of adapters and their bases, each opened once for all tensors."""

    def __init__(self, checkpoints: CheckpointCollection) -> None:
        self.checkpoints = checkpoints
        self._adapters: dict[str, tuple[ReadFactors, Read]] = {}
        self._bases: dict[int, Read] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        self._adapters.clear()
        self._bases.clear()
        self._stack.close()

    def __call__(self, name: str, one: LowRankCheckpoint) -> tuple[Read, ReadFactors, Read]:
        """Readers of the base, of the factors, and of the tensors that are stored as a whole."""
        if name not in self._adapters:
            if len(self._adapters) == MOST_OPEN:
                self._close()
            self._adapters[name] = self._stack.enter_context(self.checkpoints.open_factors(name))
        if id(one.base) not in self._bases:  # a legacy file is held while it is open
            self._bases[id(one.base)] = self._stack.enter_context(one.base.open())
        return self._bases[id(one.base)], *self._adapters[name]
