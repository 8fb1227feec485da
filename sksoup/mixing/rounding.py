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
    most = MOST_OF_RESULT * (sizes + sizes.median())
    bound = torch.finfo(expected.dtype).eps * sizes + _of_terms(name, checkpoints, coef, most)
    return bool(((a - b).abs() <= bound).all())


def _of_terms(
    name: str, checkpoints: CheckpointCollection, coef: NDArray[np.float64], most: torch.Tensor
) -> torch.Tensor:
    """Eps min(sum_k |c_k| t_k, `MOST` max_k t_k, most); t_k = |w_0| + |B_k| |A_k|, or |w_k|."""
    used = {n: abs(c) for n, c in zip(checkpoints.names, coef, strict=True) if c}
    adapters = checkpoints.on_one_base([*used])
    is_on_base = adapters and not any(name in one.whole for one in adapters.values())
    info = checkpoints.layout[name]
    total = torch.zeros(info.shape, dtype=torch.float64)
    largest = torch.zeros_like(total)
    rank = 0
    known = checkpoints.adapters(used)
    for checkpoint, c in used.items():
        one = known.get(checkpoint)
        if one is None or name not in one.ranks or name in one.whole:
            with checkpoints.open(checkpoint) as read:
                term = read(name).double().abs()
        else:
            with one.base.open() as read, checkpoints.open_factors(checkpoint) as (factors, _):
                term = read(name).double().abs()
                if (both := factors(name)) is not None:
                    product = both.left.double().abs() @ both.right.double().abs()
                    term += product.view(term.shape)
                    rank = max(rank, both.rank)
        total += c * term
        largest = torch.maximum(largest, term)
    wide = torch.float64 if info.dtype == torch.float64 else torch.float32
    eps = STEPS * torch.finfo(wide).eps + rank * torch.finfo(torch.float64).eps
    if not is_on_base:  # if whole models are mixed, each is rounded as stored
        eps += torch.finfo(info.dtype).eps
    return eps * torch.minimum(torch.minimum(total, MOST * largest), most)
