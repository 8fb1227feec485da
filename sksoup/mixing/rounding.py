"""How far two processors may differ in a tensor that adapters change."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection


def is_rounding(
    name: str,
    expected: torch.Tensor,
    given: torch.Tensor,
    checkpoints: CheckpointCollection,
    coef: NDArray[np.float64],
) -> bool:
    """Whether two tensors of one kind differ, in each number, by no more than rounding may.

    ``coef`` is (K,). Another processor sums a product in another order, which may change the last
    bit of each term of the sum over the checkpoints, and the last bit of the result.
    """
    a, b = expected.double(), given.cpu().double()
    bound = torch.finfo(expected.dtype).eps * a.abs() + _of_terms(name, checkpoints, coef)
    return bool(((a - b).abs() <= bound).all())


def _of_terms(
    name: str, checkpoints: CheckpointCollection, coef: NDArray[np.float64]
) -> torch.Tensor:
    """The sum eps (K + 1) sum_k |c_k| (|w_0| + |B_k| |A_k|), and that of the products."""
    used = {n: abs(c) for n, c in zip(checkpoints.names, coef, strict=True) if c}
    adapters = checkpoints.on_one_base([*used])
    is_on_base = adapters and not any(name in one.whole for one in adapters.values())
    info = checkpoints.layout[name]
    # the sums' own precision; where whole models are mixed, each is rounded as it is stored
    wide = torch.float64 if info.dtype == torch.float64 else torch.float32
    eps = torch.finfo(wide if is_on_base else info.dtype).eps
    sizes = torch.zeros(info.shape, dtype=torch.float64)
    rank = 0
    known = checkpoints.adapters(used)
    for checkpoint, c in used.items():
        one = known.get(checkpoint)
        if one is None or name not in one.ranks or name in one.whole:
            with checkpoints.open(checkpoint) as read:
                sizes += c * read(name).double().abs()
            continue
        with one.base.open() as read, checkpoints.open_factors(checkpoint) as (factors, _):
            sizes += c * read(name).double().abs()
            if (both := factors(name)) is not None:
                product = both.left.double().abs() @ both.right.double().abs()
                sizes += c * product.view(sizes.shape)
                rank += both.rank
    return (eps * (len(used) + 1) + torch.finfo(torch.float64).eps * rank) * sizes
