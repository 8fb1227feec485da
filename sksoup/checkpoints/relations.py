"""Find unrelated checkpoints with medians, which are robust to a few bad ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

UNRELATED = 0.5  # a lower median cosine to the others indicates another starting point
FAR = 10.0  # times the usual distance; fine-tuned networks reach 4, failed ones start at 30
SPREAD = 3.0  # raises FAR in a wide sweep: e^(SPREAD * spread of log-distances below the median)
FAR_AT_MOST = 100.0  # however wide the sweep is
NEAR = 0.04  # of the norm of the weights: smaller distances are usual, whatever the median
HUGE = 1000.0  # times the usual largest value of a tensor
BLOCK = 256  # checkpoints compared with all others at a time, so that memory is not quadratic
LEAST = 64  # with fewer numbers that differ, fit does not warn


@dataclass(frozen=True)
class Relations:
    """Directions and distances of checkpoints, and which of them are unrelated."""

    names: tuple[str, ...]
    cosines: NDArray[np.float64]  # (K,), median of the cosines to each of the others
    distances: NDArray[np.float64]  # (K,), to the coordinate-wise median of all
    elsewhere: dict[str, str] = field(default_factory=dict)  # name -> the measurement
    far: dict[str, str] = field(default_factory=dict)

    @property
    def unrelated(self) -> dict[str, str]:
        """Measurements of the checkpoints that differ in direction or are far away, by name."""
        found = {**self.far, **self.elsewhere}
        return {name: found[name] for name in self.names if name in found}


def relate(
    names: Sequence[str],
    points: NDArray[np.float64],
    largest: Mapping[str, NDArray[np.float64]] | None = None,
    least: int = 1,
) -> Relations:
    """Compare checkpoints by some of their numbers.

    ``points`` (K, n) are scaled so that their norms are those of all weights; ``largest`` has the
    largest magnitudes (K,) of each tensor. If fewer than ``least`` numbers differ, no checkpoint is
    considered unrelated.
    """
    K = len(names)
    # scaled, so that squares of huge numbers are finite
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
    """(K,): median cosine to the others, the higher of two middle values; NaN for one point."""
    K = len(points)
    if K < 2:
        return np.full(K, np.nan)
    # norms of very small rows must not underflow
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


def mean_cosine(points: NDArray[np.float64]) -> float:
    """Mean cosine of all pairs of rows (K, n), in time K n; 1 for equal rows, which have n = 0."""
    K, n = points.shape
    if K < 2 or not n:
        return 1.0
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    unit = points / np.where(lengths > 0, lengths, 1)
    total = unit.sum(axis=0)
    return float((total @ total - (unit * unit).sum()) / (K * (K - 1)))


def _medians(
    cosines: NDArray[np.float64], both_zero: NDArray[np.bool_], first: int
) -> NDArray[np.float64]:
    """(n,): medians of the rows of cosines (n, K), without that of each with itself."""
    n, K = cosines.shape
    cosines[both_zero] = 1  # zeros are similar only to zeros
    is_other = np.ones((n, K), dtype=bool)
    is_other[np.arange(n), first + np.arange(n)] = False
    others = cosines[is_other].reshape(n, K - 1)
    return np.clip(np.sort(others, axis=1)[:, (K - 1) // 2], -1, 1)


def _far(names: Sequence[str], distances: NDArray[np.float64], length: float) -> dict[str, str]:
    """Checkpoints much farther from the median point than usual."""
    median = float(np.median(distances))
    usual = max(median, NEAR * length)
    if not usual > 0:
        return {}
    limit = FAR
    if median > 0:
        nearer = np.maximum(distances[distances <= median], median / FAR_AT_MOST)
        spread = float(np.median(np.log(median / nearer)))
        limit = min(max(FAR, math.exp(SPREAD * spread)), FAR_AT_MOST)
    measured = "{:,.0f} times the usual distance"
    return {
        name: measured.format(d / usual)
        for name, d in zip(names, distances, strict=True)
        if d > limit * usual
    }


def _other_length(names: Sequence[str], lengths: NDArray[np.float64]) -> dict[str, str]:
    """Both of two checkpoints if their norms differ greatly: it is unclear which is usual."""
    ratio = float(lengths.max() / lengths.min()) if lengths.min() > 0 else math.inf
    if ratio <= FAR:
        return {}
    return dict.fromkeys(names, f"norms that differ by a factor of {ratio:,.0f}")


def _huge(names: Sequence[str], largest: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
    """Checkpoints with much larger values than usual in a tensor."""
    usual = {tensor: float(np.median(values)) for tensor, values in largest.items()}
    floor = float(np.median(list(usual.values()))) if usual else 0.0
    found: dict[str, str] = {}
    for tensor, values in largest.items():
        limit = HUGE * max(usual[tensor], floor)
        for name, value in zip(names, values, strict=True):
            if 0 < limit < value:
                found.setdefault(name, f"values up to {value:.3g} in {tensor!r}")
    return found
