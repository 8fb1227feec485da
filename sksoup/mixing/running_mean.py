"""Running mean of checkpoints; each file is read once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.protocol import Read, TensorInfo, same_bits
from .mix import cast


class RunningMean:
    """A sum over the checkpoints kept so far, for computing their mean with one more.

    Sums are in float64, or in float32 for floats of at most two bytes; they need at most the memory
    of two models. They are numpy arrays, which joblib memory-maps for its workers.
    """

    def __init__(self, layout: Mapping[str, TensorInfo]) -> None:
        self._layout = layout
        self._kept: list[int] = []  # indices in the collection
        # sums, or the value itself while all are equal, so that infinite constants are preserved
        self._values: dict[str, NDArray[Any]] = {}
        self._differing: set[str] = set()  # tensors whose value is a sum
        self._dtypes: dict[str, torch.dtype] = {}  # promoted over the kept ones
        self._gone: list[int] = []  # indices of those that were removed

    def extend(self, checkpoints: CheckpointCollection, kept: Sequence[int]) -> None:
        """Read and add those of ``kept`` that are not in the sum yet."""
        for k in kept[len(self._kept) :]:
            with checkpoints.open(checkpoints.names[k]) as read:
                self.add(k, read)

    def add(self, k: int, read: Read) -> None:
        """Add the k-th checkpoint of the collection, which is open."""
        for tensor in self._layout:
            w = read(tensor)
            dtype = self._promoted(tensor, w)
            value, is_sum = self._with(tensor, k, w)
            self._values[tensor], self._dtypes[tensor] = value.numpy(), dtype
            if is_sum:
                self._differing.add(tensor)
        self._kept.append(k)

    def mean_with(self, k: int, read: Read) -> dict[str, torch.Tensor]:
        """The mean of those kept and the k-th checkpoint, which is open; it is not added."""
        means: dict[str, torch.Tensor] = {}
        for tensor in self._layout:
            w = read(tensor)
            value, is_sum = self._with(tensor, k, w)
            if is_sum:
                value /= len(self._kept) + 1
            means[tensor] = cast(tensor, value, self._promoted(tensor, w))
        return means

    def leave_out(self, checkpoints: CheckpointCollection, dropped: Sequence[int]) -> None:
        """Read all checkpoints, and remove those dropped, in this order, if not yet done."""
        if not self._kept:
            self.extend(checkpoints, range(len(checkpoints)))
        for k in dropped[len(self._gone) :]:
            with checkpoints.open(checkpoints.names[k]) as read:
                is_exact = all(self._subtract(tensor, read) for tensor in self._differing)
            if not is_exact:
                self._restart(checkpoints, dropped)
                return
            self._gone.append(k)

    def mean_without(self, read: Read) -> dict[str, torch.Tensor] | None:
        """The mean without one more checkpoint, which is open; integers are unchanged.

        None if the others are lost in the rounding of the sum, as with a diverged run.
        """
        n = len(self._kept) - len(self._gone) - 1
        means: dict[str, torch.Tensor] = {}
        for tensor, dtype in self._dtypes.items():
            if tensor not in self._differing:
                means[tensor] = cast(tensor, torch.as_tensor(self._values[tensor]), dtype)
                continue
            value = self._without(tensor, read)
            if value is None:
                return None
            means[tensor] = cast(tensor, value / n, dtype)
        return means

    def _subtract(self, tensor: str, read: Read) -> bool:
        """Subtract one from the sum of a tensor; False if `_without` returns None."""
        value = self._without(tensor, read)
        if value is not None:
            self._values[tensor] = value.numpy()
        return value is not None

    def _restart(self, checkpoints: CheckpointCollection, dropped: Sequence[int]) -> None:
        """Compute the sum of the remaining checkpoints again."""
        vars(self).update(vars(RunningMean(self._layout)))
        gone = {*dropped}
        self.extend(checkpoints, [k for k in range(len(checkpoints)) if k not in gone])
        self._kept, self._gone = [*range(len(checkpoints))], [*dropped]

    def _without(self, tensor: str, read: Read) -> torch.Tensor | None:
        """The sum without one; None if it is not large compared with rounding errors."""
        value = torch.tensor(self._values[tensor])
        of_sum = largest(value) * torch.finfo(value.dtype).eps
        value -= read(tensor).to(value.dtype)
        small = 2.0**-11 if self._layout[tensor].dtype.itemsize <= 2 else 2.0**-24
        return value if of_sum <= small * largest(value) < math.inf else None

    def _with(self, tensor: str, k: int, w: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The sum with ``w`` and True, or the value that all share and False."""
        n, is_float = len(self._kept), w.is_floating_point()
        if not is_float and n and k > min(self._kept):  # `mix` takes the first in the collection
            return torch.tensor(self._values[tensor]), False
        wide = torch.float64 if self._layout[tensor].dtype.itemsize > 2 else torch.float32
        own = w.to(wide if is_float else w.dtype, copy=True)
        if not is_float or not n:
            return own, False
        value = torch.tensor(self._values[tensor])
        if tensor not in self._differing:
            if same_bits(value, own):
                return value, False
            value *= n
        value += own
        return value, True

    def _promoted(self, tensor: str, w: torch.Tensor) -> torch.dtype:
        return torch.promote_types(self._dtypes.get(tensor, w.dtype), w.dtype)


def largest(value: torch.Tensor) -> float:
    """The largest magnitude."""
    if not value.numel():
        return 0.0
    low, high = (float(end) for end in torch.aminmax(value))
    return max(-low, high)
