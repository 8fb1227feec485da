"""Bound on the difference between processors in tensors with LoRA factors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection

MOST = 4  # cap on sum_k |c_k|: with larger ones the terms and their rounding cancel out
# cap on the terms, in sizes of the result: factors and adapters may cancel out, too
MOST_OF_RESULT = 16
STEPS = 4  # units in the last place; 2 if every product is off by one, also with 72 checkpoints


def is_rounding(
    name: str,
    expected: torch.Tensor,
    given: torch.Tensor,
    checkpoints: CheckpointCollection,
    coef: NDArray[np.float64],
) -> bool:
    """Whether two tensors differ in each number only by rounding.

    ``coef`` is (K,). Another processor may sum a product in another order, which may change the
    last bit of the product, of the sum over the checkpoints and of the result. The bound must not
    grow with K, the coefficients or the factors, since the authors of recipes and adapters choose
    them.
    """
    a, b = expected.double(), given.cpu().double()
    sizes = a.abs()
    usual = sizes + sizes.median()
    bound = torch.finfo(expected.dtype).eps * sizes + _of_terms(name, checkpoints, coef, usual)
    return bool(((a - b).abs() <= bound).all())


def _of_terms(
    name: str, checkpoints: CheckpointCollection, coef: NDArray[np.float64], usual: torch.Tensor
) -> torch.Tensor:
    """The rounding of the terms |w_0| + |B_k| |A_k|, and that of the weights as they are stored."""
    used = {n: abs(c) for n, c in zip(checkpoints.names, coef, strict=True) if c}
    adapters = checkpoints.on_one_base([*used])
    is_on_base = adapters and not any(name in one.whole for one in adapters.values())
    info = checkpoints.layout[name]
    terms, weights = _Sizes(info.shape), _Sizes(info.shape)
    rank = 0
    known = checkpoints.adapters(used)
    for checkpoint, c in used.items():
        one = known.get(checkpoint)
        with checkpoints.open(checkpoint) as read:
            weight = term = read(name).double().abs()
        if one is not None and name in one.ranks and name not in one.whole:
            with one.base.open() as read, checkpoints.open_factors(checkpoint) as (factors, _):
                term = read(name).double().abs()
                if (both := factors(name)) is not None:
                    product = both.left.double().abs() @ both.right.double().abs()
                    term += product.view(term.shape)
                    rank = max(rank, both.rank)
        terms.add(term, c)
        weights.add(weight, c)
    wide = torch.float64 if info.dtype == torch.float64 else torch.float32
    eps = STEPS * torch.finfo(wide).eps + rank * torch.finfo(torch.float64).eps
    bound = eps * terms.bounded(MOST_OF_RESULT * usual)
    if not is_on_base:  # if whole models are mixed, each is rounded as stored
        bound += torch.finfo(info.dtype).eps * weights.bounded(MOST * usual)
    return bound


class _Sizes:
    """Sum_k |c_k| t_k, which is at most `MOST` times the largest t_k."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.largest = torch.zeros_like(self.total)

    def add(self, term: torch.Tensor, c: float) -> None:
        self.total += c * term
        self.largest = torch.maximum(self.largest, term)

    def bounded(self, most: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.minimum(self.total, MOST * self.largest), most)
