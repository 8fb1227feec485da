"""Properties of checkpoints found while reading: finite values, and directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .relations import LEAST, Relations, mean_cosine, relate

SAMPLE, LEAST_SAMPLE = 256, 16  # numbers sampled from each tensor
MOST_SAMPLED = 1 << 24  # numbers, while that leaves `LEAST_SAMPLE` of each tensor
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are evenly spread, whatever the row length


class Health:
    """Findings on every tensor of every checkpoint, collected while they are read.

    Of each of the ``n_tensors`` of all checkpoints some numbers are kept, fewer if there are many.
    """

    def __init__(self, n_tensors: int = 1) -> None:
        self._n_sampled = min(SAMPLE, max(LEAST_SAMPLE, MOST_SAMPLED // max(1, n_tensors)))
        self._finite: dict[str, set[str]] = {}  # tensor -> checkpoints that passed
        self._infinite: dict[str, tuple[str, torch.Tensor]] = {}  # constants, and the checkpoint
        self._samples: dict[str, dict[str, NDArray[np.float64]]] = {}  # checkpoint -> tensor
        self._largest: dict[str, dict[str, float]] = {}  # magnitudes: checkpoint -> tensor
        self._is_matrix: dict[str, bool] = {}

    def unread(self, name: str, tensors: Iterable[str]) -> list[str]:
        """The tensors of a checkpoint that have not been checked."""
        return [tensor for tensor in tensors if name not in self._finite.get(tensor, ())]

    def see(self, name: str, tensor: str, value: torch.Tensor) -> str | None:
        """Name of the checkpoint with NaN, or with Inf in a tensor that differs between them."""
        seen = self._finite.setdefault(tensor, set())
        if name in seen:
            return None
        largest = self._look(name, tensor, value)
        if math.isnan(largest):
            return name
        infinite = math.isinf(largest)
        if infinite and not seen:
            self._infinite[tensor] = (name, value.clone())
        elif infinite or tensor in self._infinite:
            first, constant = self._infinite.get(tensor, (name, None))
            if constant is None or not torch.equal(constant, value):
                return name if infinite else first
        seen.add(name)
        return None

    def share(self, name: str, other: str, tensor: str) -> bool:
        """Copy the findings on the same tensor of another checkpoint, if there are any."""
        seen = self._finite.get(tensor, set())
        if other not in seen:
            return False
        seen.add(name)
        if tensor in self._samples.get(other, ()):
            self._samples.setdefault(name, {})[tensor] = self._samples[other][tensor]
            self._largest.setdefault(name, {})[tensor] = self._largest[other][tensor]
        return True

    def _look(self, name: str, tensor: str, value: torch.Tensor) -> float:
        """The largest magnitude, which may be NaN or Inf; samples numbers of a finite tensor."""
        if not value.is_floating_point() or not value.numel():
            return 0.0
        # two numbers per tensor: NaN propagates into both
        low, high = torch.aminmax(value if value.dtype.itemsize > 1 else value.float())
        largest = max(abs(float(low)), abs(float(high)))
        if math.isfinite(largest) and not math.isnan(float(low)):
            self._samples.setdefault(name, {})[tensor] = sample(value, self._n_sampled)
            self._largest.setdefault(name, {})[tensor] = largest
            self._is_matrix[tensor] = value.ndim > 1
            return largest
        return math.nan if math.isnan(float(low)) else math.inf

    def relations(
        self, names: Iterable[str], tensors: Iterable[str], least: int = LEAST
    ) -> Relations:
        """Compare the checkpoints that were read, by their samples."""
        read = [name for name in names if name in self._samples]
        seen = [self._samples[name] for name in read]
        shared = [t for t in tensors if seen and all(t in samples for samples in seen)]
        # scales of norms start at 1 in every network, so directions are those of matrices, if any
        # differ
        matrices = self._points(read, [t for t in shared if self._is_matrix[t]])
        points = matrices if matrices.shape[1] else self._points(read, shared)
        largest = {t: np.array([self._largest[name][t] for name in read]) for t in shared}
        return relate(read, points, largest, least)

    def matrix_cosines(self, names: Sequence[str]) -> dict[str, float]:
        """Mean cosine between two of these checkpoints, for every matrix that was read of all."""
        seen = [self._samples.get(name, {}) for name in names]
        matrices = [
            tensor
            for tensor, is_matrix in self._is_matrix.items()
            if is_matrix and seen and all(tensor in samples for samples in seen)
        ]
        return {tensor: mean_cosine(self._points(names, [tensor])) for tensor in matrices}

    def _points(self, names: Sequence[str], tensors: Sequence[str]) -> NDArray[np.float64]:
        """(K, n): the samples of those of these tensors that differ."""
        parts = [np.stack([self._samples[name][t] for name in names]) for t in tensors]
        differing = [part for part in parts if (part[:1] != part).any()]
        return np.concatenate([*differing, np.empty((len(names), 0))], axis=1)


def sample(value: torch.Tensor, n_sampled: int) -> NDArray[np.float64]:
    """Evenly spread numbers of a tensor, scaled so that their norm estimates that of all."""
    flat = value.detach().reshape(-1)
    n = len(flat)
    if n <= n_sampled:
        return flat.double().numpy().copy()
    where = (np.arange(n_sampled) * GOLDEN % 1 * n).astype(np.int64)
    few: NDArray[np.float64] = flat[torch.as_tensor(where)].double().numpy()
    return few * math.sqrt(n / n_sampled)
