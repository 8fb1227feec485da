"""What reading shows of checkpoints: whether they are finite, and where they point."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

UNRELATED = 0.5  # cosine to the others below which two networks hardly share a start
SAMPLE = 64  # numbers kept of each matrix


class Health:
    """What was seen of every tensor of every checkpoint, gathered while they are read."""

    def __init__(self) -> None:
        self._finite: dict[str, set[str]] = {}  # tensor -> checkpoints that passed
        self._infinite: dict[str, tuple[str, torch.Tensor]] = {}  # constants, and whose
        self._samples: dict[str, dict[str, NDArray[np.float64]]] = {}  # checkpoint -> tensor

    def unread(self, name: str, tensors: Iterable[str]) -> list[str]:
        """The tensors of a checkpoint that have not been seen."""
        return [tensor for tensor in tensors if name not in self._finite.get(tensor, ())]

    def see(self, name: str, tensor: str, value: torch.Tensor) -> str | None:
        """Name of the checkpoint that holds NaN, or Inf in a tensor that is not the same in all."""
        seen = self._finite.setdefault(tensor, set())
        if name in seen:
            return None
        if value.is_floating_point() and value.numel():
            # two numbers per tensor: NaN propagates into both
            low, high = torch.aminmax(value if value.dtype.itemsize > 1 else value.float())
            if value.ndim > 1:  # a few numbers of a matrix, evenly spread
                flat = value.flatten()
                few = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE]
                self._samples.setdefault(name, {})[tensor] = few.double().numpy().copy()
            if bool(torch.isnan(low) | torch.isnan(high)):
                return name
            infinite = bool(torch.isinf(low) | torch.isinf(high))
            if infinite and not seen:
                self._infinite[tensor] = (name, value.clone())
            elif infinite or tensor in self._infinite:
                first, constant = self._infinite.get(tensor, (name, None))
                if constant is None or not torch.equal(constant, value):
                    return name if infinite else first
        seen.add(name)
        return None

    def strangers(self, names: Iterable[str], tensors: Iterable[str]) -> list[str]:
        """Checkpoints whose samples, where they differ, point elsewhere than the others' mean."""
        read = {name: self._samples[name] for name in names if name in self._samples}
        if len(read) < 2:
            return []
        shared = [t for t in tensors if all(t in samples for samples in read.values())]
        parts = ([s[t] for t in shared] for s in read.values())
        S = np.stack([np.concatenate([*part, np.empty(0)]) for part in parts])  # (K, n)
        S = S[:, (S[0] != S).any(axis=0)]
        if S.shape[1] < SAMPLE:
            return []
        others = (S.sum(axis=0) - S) / (len(read) - 1)
        lengths = np.linalg.norm(S, axis=1) * np.linalg.norm(others, axis=1)
        cosines = (S * others).sum(axis=1) / np.where(lengths > 0, lengths, 1)
        return [name for name, cosine in zip(read, cosines, strict=True) if cosine < UNRELATED]
