"""Model Stock: the ratio between the pretrained weights and the mean of the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from .layers import Layers


def stock_ratios(
    checkpoints: CheckpointCollection,
    start: str,
    layers: Layers,
    parameters: Collection[str],
    warn: Callable[[str], None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ratio t and cos(theta) of each searched row, (n_searched,), over the parameters in it.

    Jang et al., arXiv:2403.19522, Eqs. 1 and 5: t = K cos / (1 + (K - 1) cos), with the mean cosine
    between the K differences from the pretrained weights. If it is not above 0, t is 0, the
    pretrained weights. With a single difference, which has no angle, t is 1; with none, 0. No pass
    over the pairs is needed: the squared norm of the sum of K unit vectors is K + K (K - 1) cos.
    ``warn`` is called for a copy of the start among the checkpoints.
    """
    tuned = [name for name in checkpoints if name != start]
    K, rows = len(tuned), layers.rows
    weights = {n: w for n, w in checkpoints[start].items() if n in parameters}
    sums = {n: torch.zeros(w.shape, dtype=torch.float64) for n, w in weights.items()}
    n_moving = np.zeros(layers.n_searched)
    for k, name in enumerate(tuned):
        for following in tuned[k + 1 : k + 2]:
            checkpoints.warm(following)
        with checkpoints.open(name) as read:
            lengths = np.zeros(layers.n_searched)
            for n, w in weights.items():
                lengths[rows[n]] = math.hypot(lengths[rows[n]], _length(_difference(read(n), w)))
            n_moving += lengths > 0
            if not lengths.any():
                warn(
                    f"{name!r} has the same parameters as the start {start!r}, and is counted as "
                    f"one of the fine-tuned checkpoints. If it is the start, leave it out of them."
                )
            for n, w in weights.items():
                if length := lengths[rows[n]]:
                    sums[n] += _difference(read(n), w) / length
    totals = np.zeros(layers.n_searched)
    for n, total in sums.items():
        totals[rows[n]] += float(total.square().sum())
    if K < 2:
        return np.full(layers.n_searched, float(K)), np.ones(layers.n_searched)
    cos = (totals - n_moving) / (K * (K - 1))
    return K * cos.clip(0, 1) / (1 + (K - 1) * cos.clip(0, 1)), cos


def _difference(w: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The difference in float64; 0 where both are equal, even if they are infinite."""
    w, start = w.double(), start.double()
    return torch.where(w == start, 0.0, w - start)


def _length(difference: torch.Tensor) -> float:
    """The norm of a tensor, also if squares would overflow or underflow in float64."""
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    scale = math.ldexp(1.0, max(-1000, min(1000, math.frexp(largest)[1])))
    return scale * math.sqrt(float((difference / scale).square().sum()))


def stock_coef(
    checkpoints: CheckpointCollection, start: str, ratios: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n_searched, K + 1): t / K for each checkpoint, 1 - t for the pretrained weights."""
    is_start = np.array([name == start for name in checkpoints])
    t = ratios[:, None]
    coef: NDArray[np.float64] = np.where(is_start, 1 - t, t / max(1, (~is_start).sum()))
    return coef
