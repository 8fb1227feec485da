"""Which checkpoints do not belong to the others: by medians, which a few bad ones can't move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

UNRELATED = 0.5  # median cosine to the others below which a network hardly shares their start
FAR = 10.0  # times the usual distance; real fine-tunings reach 4, failed ones begin at 30
SPREAD = 3.0  # a wide sweep raises FAR: e^(SPREAD * spread of the log-distances below the median)
FAR_AT_MOST = 100.0  # however wide the sweep is
NEAR = 0.04  # of the weights' length: distances below are usual, whatever their median is
HUGE = 1000.0  # times the largest value that is usual in a tensor
BLOCK = 256  # checkpoints compared with all others at a time: memory does not grow as their square
LEAST = 64  # numbers that differ, with fewer of which a fit does not warn


@dataclass(frozen=True)
class Relations:
    """How checkpoints lie to each other: directions, distances, and which are unrelated."""

    names: tuple[str, ...]
    cosines: NDArray[np.float64]  # (K,), median of the cosines to each of the others
    distances: NDArray[np.float64]  # (K,), to the coordinate-wise median of all
    elsewhere: dict[str, str] = field(default_factory=dict)  # name -> what was measured
    far: dict[str, str] = field(default_factory=dict)

    @property
    def unrelated(self) -> dict[str, str]:
        """What was measured of those that point elsewhere or lie far from the others, by name."""
        found = {**self.far, **self.elsewhere}
        return {name: found[name] for name in self.names if name in found}


def relate(
    names: Sequence[str],
    points: NDArray[np.float64],
    largest: Mapping[str, NDArray[np.float64]] | None = None,
    least: int = 1,
) -> Relations:
    """Compare checkpoints by some of their numbers.

    ``points`` (K, n) are scaled so that lengths are those of all weights; ``largest`` has the
    largest magnitudes (K,) in each tensor. Where fewer than ``least`` numbers differ,
    nothing is judged.
    """
    K = len(names)
    # divided, so that squares of huge numbers are finite
    scale = float(np.abs(points).max(initial=0)) or 1.0
    points = points / scale
    center = np.median(points, axis=0) if K else points.sum(axis=0)
    distances = np.linalg.norm(points - center, axis=1)
    cosines = median_cosines(points)
    found = Relations(tuple(names), cosines, distances * scale)
    if K < 2 or (points[:1] != points).any(axis=0).sum() < least:
        return found
    for k, name in enumerate(names):
        if cosines[k] < UNRELATED:
            found.elsewhere[name] = f"median cosine {cosines[k]:.2f}, expected {UNRELATED} or more"
    found.far.update(_far(names, distances, float(np.linalg.norm(center))))
    if K == 2:
        found.far.update(_other_length(names, np.linalg.norm(points, axis=1)))
    for name, measured in _huge(names, largest or {}).items():
        found.far.setdefault(name, measured)
    return found


def median_cosines(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,): median cosine to each of the others, the higher of two; NaN for a single point."""
    K = len(points)
    if K < 2:
        return np.full(K, np.nan)
    # lengths of rows that are tiny beside others must not underflow
    most = np.abs(points).max(axis=1, initial=0, keepdims=True)
    unit = points / np.where(most > 0, most, 1)
    lengths = np.linalg.norm(unit, axis=1, keepdims=True)
    unit = unit / np.where(lengths > 0, lengths, 1)
    zero = lengths[:, 0] == 0
    found = [
        _medians(unit[k : k + BLOCK] @ unit.T, zero[k : k + BLOCK, None] & zero, k)
        for k in range(0, K, BLOCK)
    ]
    return np.concatenate(found)


def _medians(
    cosines: NDArray[np.float64], both_zero: NDArray[np.bool_], first: int
) -> NDArray[np.float64]:
    """(n,): medians of rows of the cosines (n, K), but for that of each with itself."""
    n, K = cosines.shape
    cosines[both_zero] = 1  # zeros are like zeros, and like nothing else
    is_other = np.ones((n, K), dtype=bool)
    is_other[np.arange(n), first + np.arange(n)] = False
    others = cosines[is_other].reshape(n, K - 1)
    return np.clip(np.sort(others, axis=1)[:, (K - 1) // 2], -1, 1)


def _far(names: Sequence[str], distances: NDArray[np.float64], length: float) -> dict[str, str]:
    """Those much farther from the median point than is usual among these."""
    median = float(np.median(distances))
    usual = max(median, NEAR * length)
    if not usual > 0:
        return {}
    limit = FAR
    if median > 0:
        nearer = np.maximum(distances[distances <= median], median / FAR_AT_MOST)
        spread = float(np.median(np.log(median / nearer)))
        limit = min(max(FAR, math.exp(SPREAD * spread)), FAR_AT_MOST)
    measured = "{:,.0f} times as far from them as is usual"
    return {
        name: measured.format(d / usual)
        for name, d in zip(names, distances, strict=True)
        if d > limit * usual
    }


def _other_length(names: Sequence[str], lengths: NDArray[np.float64]) -> dict[str, str]:
    """Both of two checkpoints, where one is much longer: it can't be said which is usual."""
    ratio = float(lengths.max() / lengths.min()) if lengths.min() > 0 else math.inf
    if ratio <= FAR:
        return {}
    return dict.fromkeys(names, f"lengths that differ by a factor of {ratio:,.0f}")


def _huge(names: Sequence[str], largest: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
    """Those that hold much larger values than is usual in a tensor."""
    usual = {tensor: float(np.median(values)) for tensor, values in largest.items()}
    floor = float(np.median(list(usual.values()))) if usual else 0.0
    found: dict[str, str] = {}
    for tensor, values in largest.items():
        limit = HUGE * max(usual[tensor], floor)
        for name, value in zip(names, values, strict=True):
            if 0 < limit < value:
                found.setdefault(name, f"values up to {value:.3g} in {tensor!r}")
    return found
