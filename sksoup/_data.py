"""Held-out data on a device, in minibatches; labels <-> module outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Task: TypeAlias = Literal["classification", "regression", "multilabel"]
TASKS = ("classification", "regression", "multilabel")


@dataclass(frozen=True)
class Batch:
    """A few rows: inputs (n, ...), targets (n, ...), weights (n,) or None."""

    X: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.X)


@dataclass(frozen=True)
class HeldOut:
    """All held-out rows on one device."""

    X: torch.Tensor  # (N, ...)
    y: torch.Tensor  # (N,) class indices, else (N, n_outputs)
    weight: torch.Tensor | None  # (N,)

    def __len__(self) -> int:
        return len(self.X)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.X, self.y, self.weight) if t is not None)

    def batches(
        self, batch_size: int | None, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Walk the rows once, shuffled when a generator is given; None is one full batch."""
        n = len(self)
        size = n if batch_size is None else min(batch_size, n)
        order = None
        if generator is not None:
            order = torch.randperm(n, generator=generator).to(self.X.device)
        for start in range(0, n, size):
            rows: Any = slice(start, start + size)
            if order is not None:
                rows = order[rows]
            yield Batch(
                self.X[rows],
                self.y[rows],
                None if self.weight is None else self.weight[rows],
            )


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn "auto" into cuda, else mps, else cpu."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def inputs_to_tensor(
    X: NDArray[Any] | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Move inputs to the device: floating ones in the module's dtype, integers as they are."""
    tensor = torch.as_tensor(X)
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def resolve_classes(y: NDArray[Any], n_outputs: int, classes: ArrayLike | None) -> NDArray[Any]:
    """Labels in output order; a held-out fold that lacks a label must not shift the columns."""
    present = np.unique(y)
    if classes is not None:
        known = np.asarray(classes)
        if known.ndim != 1 or len(np.unique(known)) != n_outputs or len(known) != n_outputs:
            raise ValueError(
                f"classes must be {n_outputs} distinct labels, one per output of the module, got "
                f"{_some(known)}."
            )
        unknown = np.setdiff1d(present, known)
        if len(unknown):
            raise ValueError(f"y holds labels that are not in classes: {_some(unknown)}.")
        return known
    if len(present) == n_outputs:
        return present
    if np.issubdtype(present.dtype, np.integer) and present[0] >= 0 and present[-1] < n_outputs:
        return np.arange(n_outputs)
    raise ValueError(
        f"y can't be matched to the module's outputs: got {len(present)} distinct labels "
        f"({_some(present)}) for {n_outputs} outputs, expected {n_outputs} labels or integers in "
        f"[0, {n_outputs}). Give the labels in output order: classes=[...]."
    )


def encode_targets(
    y: NDArray[Any],
    task: Task,
    classes: NDArray[Any] | None,
    n_outputs: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Targets as the criterion wants them: class indices (N,), else floats (N, n_outputs)."""
    if task == "classification":
        if classes is None:
            raise TypeError("classification needs classes")
        order = np.argsort(classes)
        return torch.as_tensor(order[np.searchsorted(classes, y, sorter=order)]).to(device)
    targets = torch.as_tensor(np.asarray(y, dtype=np.float64)).reshape(len(y), -1)
    if targets.shape[1] != n_outputs:
        raise ValueError(
            f"y has {targets.shape[1]} targets per row, expected {n_outputs}, one per output of "
            f"the module."
        )
    if task == "multilabel" and not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError("y must hold only 0 and 1 for task='multilabel'.")
    return targets.to(device, dtype)


def _some(values: NDArray[Any]) -> str:
    shown = ", ".join(repr(value) for value in values[:5].tolist())
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")
