"""Held-out data on a device, in minibatches; labels <-> module outputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..runtime.distributed import n_ranks
from ..runtime.memory import free_bytes

Task: TypeAlias = Literal["classification", "regression", "multilabel"]
TASKS = ("classification", "regression", "multilabel")


# what a module is fed: f(X), f(**X) or f(*X)
Inputs: TypeAlias = torch.Tensor | dict[str, torch.Tensor] | tuple[torch.Tensor, ...]


IGNORED = -100  # a label that is left out, as in torch's criteria


def is_dense(y: Any) -> bool:
    """Whether there are labels at several positions of a row: of pixels, of tokens."""
    return bool(y.ndim > 1 and y.shape[1:] != (1,))


def is_multiple(X: Any) -> bool:
    """Whether X is several inputs, by name or by position, rather than one."""
    if isinstance(X, Mapping):
        return all(isinstance(name, str) for name in X)
    return isinstance(X, tuple) and all(hasattr(part, "shape") for part in X)


def map_inputs(function: Callable[[Any], Any], X: Any) -> Any:
    """Apply a function to X, or to each of its inputs."""
    if isinstance(X, Mapping):
        return {name: function(part) for name, part in X.items()}
    return tuple(map(function, X)) if isinstance(X, tuple) else function(X)


def parts_of(X: Any) -> list[Any]:
    """The inputs in X, one or several."""
    if isinstance(X, Mapping):
        return list(X.values())
    return list(X) if isinstance(X, tuple) else [X]


def n_rows(X: Any) -> int:
    """How many rows."""
    return len(parts_of(X)[0])


def take_rows(X: Any, rows: torch.Tensor) -> Any:
    """Some rows of every input, each where it is."""
    return map_inputs(lambda part: part[rows.to(part.device)], X)


def take(X: Inputs, rows: slice | torch.Tensor) -> Inputs:
    """Some rows of tensors, copied: a module may write into what it is fed."""
    is_view = isinstance(rows, slice)
    copied: Inputs = map_inputs(lambda part: part[rows].clone() if is_view else part[rows], X)
    return copied


def amounts(weight: torch.Tensor | None, counted: torch.Tensor | None) -> torch.Tensor | None:
    """How much each row counts: its weight times its positions that have a label."""
    if weight is None or counted is None:
        return counted if weight is None else weight
    return weight * counted


@dataclass(frozen=True)
class Batch:
    """A few rows: inputs (n, ...), targets (n, ...), weights (n,) or None.

    In a distributed job they are this rank's part of a minibatch, and may be none. The inputs are
    its own, for modules that write into them.
    """

    X: Inputs
    y: torch.Tensor
    weight: torch.Tensor | None
    counted: torch.Tensor | None  # (n,), as in `HeldOut`
    total: torch.Tensor | int  # amount of the whole minibatch, over all ranks

    def __len__(self) -> int:
        return n_rows(self.X)

    @property
    def amounts(self) -> torch.Tensor | None:
        """(n,): how much a row counts, or None where all are equal."""
        return amounts(self.weight, self.counted)

    @property
    def amount(self) -> torch.Tensor | int:
        """How much these rows count: their number, where all are equal."""
        return len(self) if self.amounts is None else self.amounts.sum()


@dataclass(frozen=True)
class HeldOut:
    """All held-out rows: on the device, or, where that is too small, inputs in host memory."""

    X: Inputs  # (N, ...)
    y: torch.Tensor  # (N,) class indices, else (N, n_outputs); on the device
    weight: torch.Tensor | None  # (N,), on the device
    is_streamed: bool = False  # a thread moves the inputs of the next minibatch to the device
    counted: torch.Tensor | None = None  # (N,), positions with a label, where some have none

    @property
    def amounts(self) -> torch.Tensor | None:
        """(N,): how much a row counts, or None where all are equal."""
        return amounts(self.weight, self.counted)

    def __len__(self) -> int:
        return n_rows(self.X)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*parts_of(self.X), self.y, self.weight) if t is not None)

    def select(self, rows: torch.Tensor) -> HeldOut:
        """Some of the rows, copied."""
        X, there = take_rows(self.X, rows), rows.to(self.y.device)
        weight = None if self.weight is None else self.weight[there]
        counted = None if self.counted is None else self.counted[there]
        return HeldOut(X, self.y[there], weight, self.is_streamed, counted)

    def _move(self, part: torch.Tensor) -> torch.Tensor:
        """To the device, through pinned memory where that is faster."""
        part = part.pin_memory() if self.y.is_cuda else part
        return part.to(self.y.device, non_blocking=True)

    def n_batches(self, batch_size: int | None, together: int = 1) -> int:
        """Steps of one walk over the rows, ``together`` minibatches each."""
        batches = 1 if batch_size is None else -(-len(self) // batch_size)
        return -(-batches // together)

    def batches(
        self,
        batch_size: int | None,
        generator: torch.Generator | None = None,
        part: Callable[[int], slice] = slice,
    ) -> Iterator[Batch]:
        """Walk the rows once, shuffled when a generator is given; None is one full batch.

        ``part`` tells which of a minibatch's n rows are wanted: this rank's.
        """
        n, amounts = len(self), self.amounts  # computed once
        size = n if batch_size is None else min(batch_size, n)
        order = None if generator is None else torch.randperm(n, generator=generator)
        if order is not None and not self.is_streamed:
            order = order.to(self.y.device)

        def batch(start: int) -> Batch:
            stop = min(start + size, n)
            first, last, _ = part(stop - start).indices(stop - start)
            rows: Any = slice(start + first, start + last)
            whole: Any = slice(start, stop)
            if order is not None:
                rows, whole = order[rows], order[whole]
            X = take(self.X, rows)
            if self.is_streamed:
                X = map_inputs(self._move, X)
            if order is not None:
                rows, whole = rows.to(self.y.device), whole.to(self.y.device)
            weight = None if self.weight is None else self.weight[rows]
            counted = None if self.counted is None else self.counted[rows]
            total = stop - start if amounts is None else amounts[whole].sum()
            return Batch(X, self.y[rows], weight, counted, total)

        starts = range(0, n, size)
        yield from one_ahead(batch, starts) if self.is_streamed else map(batch, starts)


def one_ahead(make: Callable[[int], Batch], starts: Iterable[int]) -> Iterator[Batch]:
    """Make each minibatch in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="sksoup-batches") as pool:
        pending: Future[Batch] | None = None
        for start in starts:
            following = pool.submit(make, start)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn "auto" into cuda, else mps, else cpu; the ranks on one machine take one GPU each."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0)) if n_ranks() > 1 else None
        return torch.device("cuda" if local is None else f"cuda:{local}")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def to_tensor(values: Any) -> torch.Tensor:
    """View an array as a tensor; copy what may not be written to (torch knows no such tensors)."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()
    return torch.as_tensor(values)


def to_inputs(X: Any, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Move inputs to the device: floating ones in the module's dtype, integers as they are."""

    def move(part: Any) -> torch.Tensor:
        tensor = to_tensor(part)
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    inputs: Inputs = map_inputs(move, X)
    return inputs


def fits(X: Inputs, device: torch.device) -> bool:
    """Whether inputs may live on the device for a whole fit: at most a quarter of what is free."""
    nbytes = sum(part.nbytes for part in parts_of(X))
    return device.type == "cpu" or 4 * nbytes <= free_bytes(device)


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
    ignored: int = IGNORED,
) -> torch.Tensor:
    """Targets as the criterion wants them: class indices (N, ...), else floats (N, n_outputs).

    Positions to leave out become ``ignored``, the criterion's number for them.
    """
    if task == "classification":
        if classes is None:
            raise TypeError("classification needs classes")
        order = np.argsort(classes)
        where = np.searchsorted(classes, y, sorter=order)
        if is_dense(y):
            where = np.where(y == IGNORED, 0, where)
            return to_tensor(np.where(y == IGNORED, ignored, order[where])).to(device)
        return torch.as_tensor(order[where]).to(device)
    targets = to_tensor(np.asarray(y, dtype=np.float64)).reshape(len(y), -1)
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
