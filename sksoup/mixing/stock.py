"""Model Stock: the ratio between the pretrained weights and the mean of the checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from .layers import Layers

MOST_ELEMENTS = 1 << 26  # summed at a time: 512 MiB in float64; more if a row has more


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
    totals, n_moving = np.zeros((2, layers.n_searched))
    has_moved = dict.fromkeys(tuned, False)
    for part in _parts(checkpoints, parameters, rows):
        with checkpoints.open(start) as read:
            weights = {n: read(n).clone() for n in part}
        sums = {n: torch.zeros(w.shape, dtype=torch.float64) for n, w in weights.items()}
        for k, name in enumerate(tuned):
            for following in tuned[k + 1 : k + 2]:
                checkpoints.warm(following)
            lengths = np.zeros(layers.n_searched)
            with checkpoints.open(name) as read:
                for n, w in weights.items():
                    length = _length(_difference(read(n), w))
                    lengths[rows[n]] = math.hypot(lengths[rows[n]], length)
                for n, w in weights.items():
                    if length := lengths[rows[n]]:
                        sums[n] += _difference(read(n), w) / length
            n_moving += lengths > 0
            has_moved[name] |= bool(lengths.any())
        for n, total in sums.items():
            totals[rows[n]] += float(total.square().sum())
    for name in (name for name, has in has_moved.items() if not has):
        warn(
            f"{name!r} has the same parameters as the start {start!r}, and is counted as one of "
            f"the fine-tuned checkpoints. If it is the start, leave it out of them."
        )
    if K < 2:
        return np.full(layers.n_searched, float(K)), np.ones(layers.n_searched)
    cos = (totals - n_moving) / (K * (K - 1))
    return K * cos.clip(0, 1) / (1 + (K - 1) * cos.clip(0, 1)), cos


def _parts(
    checkpoints: CheckpointCollection, parameters: Collection[str], rows: Mapping[str, int]
) -> Iterator[list[str]]:
    """Parameters in whole rows, some at a time, so that memory does not grow with the model."""
    by_row: defaultdict[int, list[str]] = defaultdict(list)
    wanted = set(parameters)
    for name in checkpoints.layout:
        if name in wanted:
            by_row[rows[name]].append(name)
    part: list[str] = []
    n_elements = 0
    for names in by_row.values():
        size = sum(checkpoints.layout[name].size for name in names)
        if part and n_elements + size > MOST_ELEMENTS:
            yield part
            part, n_elements = [], 0
        part += names
        n_elements += size
    if part:
        yield part


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
