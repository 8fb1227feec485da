"""Rows: one input or several, on a device, in minibatches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..runtime.distributed import world_size
from ..runtime.memory import free_bytes
from .arrays import Inputs, map_inputs, parts_of
from .indexed import IndexedRows


def is_multiple(X: Any) -> bool:
    """Whether X is several inputs, by name or by position, rather than one."""
    if isinstance(X, Mapping):
        return all(isinstance(name, str) for name in X)
    return isinstance(X, tuple) and all(hasattr(part, "shape") for part in X)


def is_loader(X: Any) -> bool:
    """Whether X is a Dataset, a DataLoader or an iterator of batches."""
    is_hub = hasattr(X, "with_format") and hasattr(X, "column_names")  # datasets.Dataset
    kinds = (Dataset, DataLoader, Iterator, np.memmap, IndexedRows)
    return isinstance(X, kinds) or is_hub


def take_rows(X: Any, rows: torch.Tensor) -> Any:
    """Some rows of every input, each where it is."""
    if isinstance(X, IndexedRows):
        return X.take(rows)
    return map_inputs(lambda part: part[rows.to(part.device)], X)


@dataclass(frozen=True)
class Batch:
    """A minibatch, or this rank's part of it, which may be empty; its inputs are copies."""

    X: Inputs  # (n, ...)
    y: torch.Tensor  # (n, ...)
    weight: torch.Tensor | None  # (n,)
    counted: torch.Tensor | None  # (n,), as in `HeldOut`
    amounts: torch.Tensor | None  # (n,), how much a row counts; None where all are equal
    amount: torch.Tensor | int  # their sum: n where all are equal
    total: torch.Tensor | int  # amount of the whole minibatch, over all ranks

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class HeldOut:
    """All held-out rows on the device, or with inputs in host memory if the device is too small.

    If host memory is also too small, inputs are read by index.
    """

    X: Inputs | IndexedRows  # (N, ...)
    y: torch.Tensor  # (N,) class indices, else (N, n_outputs); on the device
    weight: torch.Tensor | None  # (N,), on the device
    is_streamed: bool = False  # a thread moves the inputs of the next minibatch to the device
    counted: torch.Tensor | None = None  # (N,), positions with a label, where some have none

    @property
    def amounts(self) -> torch.Tensor | None:
        """(N,): weight times positions with a label of every row; None where all are equal."""
        if self.weight is None or self.counted is None:
            return self.counted if self.weight is None else self.weight
        return self.weight * self.counted

    def __len__(self) -> int:
        return len(self.y)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*parts_of(self.X), self.y, self.weight) if t is not None)

    def select(self, rows: torch.Tensor) -> HeldOut:
        """Some of the rows, copied."""
        X = self.X.select(rows) if isinstance(self.X, IndexedRows) else take_rows(self.X, rows)
        there = rows.to(self.y.device)
        weight = None if self.weight is None else self.weight[there]
        counted = None if self.counted is None else self.counted[there]
        return HeldOut(X, self.y[there], weight, self.is_streamed, counted)

    def _move(self, part: torch.Tensor) -> torch.Tensor:
        """To the device, through pinned memory where that is faster."""
        part = part.pin_memory() if self.y.is_cuda else part
        return part.to(self.y.device, non_blocking=True)

    def n_batches(self, batch_size: int | None, together: int = 1) -> int:
        """Steps of one walk over the rows, ``together`` minibatches each."""
        batches = 1 if batch_size is None else -(-len(self.y) // batch_size)
        return -(-batches // together)

    def batches(
        self,
        batch_size: int | None,
        generator: torch.Generator | None = None,
        part: Callable[[int], slice] = slice,
        needs_one: bool = False,
    ) -> Iterator[Batch]:
        """Walk the rows once, shuffled by a generator; ``part`` gives this rank's of n rows.

        With ``needs_one`` a rank that has none of a minibatch gets one that does not count.
        """
        n, amounts = len(self.y), self.amounts  # computed once
        size = n if batch_size is None else min(batch_size, n)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        if not self.is_streamed:
            order = order.to(self.y.device)
        mine = {many: part(many) for many in {size, n % size or size}}

        wholes = [order[i : i + size] for i in range(0, n, size)]
        parts = [whole[mine[len(whole)]] for whole in wholes]  # this rank's of each minibatch
        spare = [needs_one and not len(rows) for rows in parts]
        parts = [w[-1:] if s else rows for w, rows, s in zip(wholes, parts, spare, strict=True)]
        read = self._read(parts)

        def batch(index: int) -> Batch:
            whole, rows, X = wholes[index], parts[index], next(read)
            if self.is_streamed:
                X = map_inputs(self._move, X)
            there, all_there = rows.to(self.y.device), whole.to(self.y.device)
            weight = None if self.weight is None else self.weight[there]
            counted = None if self.counted is None else self.counted[there]
            total = len(whole) if amounts is None else amounts[all_there].sum()
            each = None if amounts is None else amounts[there]
            amount = len(there) if each is None else each.sum()
            amount = 0 * amount if spare[index] else amount
            return Batch(X, self.y[there], weight, counted, each, amount, total)

        numbers = range(len(wholes))
        yield from one_ahead(batch, numbers) if self.is_streamed else map(batch, numbers)

    def _read(self, parts: Sequence[torch.Tensor]) -> Iterator[Inputs]:
        """The inputs of these rows, part by part."""
        if isinstance(self.X, IndexedRows):
            return self.X.batches(parts)
        # indexing copies, as a module may write into what it is fed
        return (map_inputs(lambda part: part[rows], self.X) for rows in parts)  # noqa: B023


def one_ahead(make: Callable[[int], Batch], numbers: Iterable[int]) -> Iterator[Batch]:
    """Make each minibatch in a thread while the one before it is in use.

    It is not a thread of an executor: these are joined at the exit of each process that is forked
    from them, as workers of a DataLoader are, which fails there.
    """
    tasks: SimpleQueue[tuple[Future[Batch], int] | None] = SimpleQueue()

    def submit(number: int) -> Future[Batch]:
        made: Future[Batch] = Future()
        tasks.put((made, number))
        return made

    def work() -> None:
        for made, number in iter(tasks.get, None):
            try:
                made.set_result(make(number))
            except BaseException as error:  # raised where the minibatch is used
                made.set_exception(error)

    thread = Thread(target=work, name="sksoup-batches", daemon=True)
    thread.start()
    try:
        pending: Future[Batch] | None = None
        for number in numbers:
            following = submit(number)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
    finally:
        tasks.put(None)
        thread.join()


def resolve_device(device: str | torch.device) -> torch.device:
    """Resolve "auto" to cuda, mps or cpu; each rank on a machine uses its own GPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else None
        return torch.device("cuda" if local is None else f"cuda:{local}")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def to_tensor(values: Any) -> torch.Tensor:
    """View an array as a tensor; copy a read-only or reversed one, as torch has no such tensors."""
    if isinstance(values, np.ndarray):
        is_odd = not values.flags.writeable or any(step < 0 for step in values.strides)
        values = values.copy() if is_odd else values
    return torch.as_tensor(values)


def to_inputs(X: Any, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Move inputs to the device; floating-point ones are converted to the module's dtype."""

    def move(part: Any) -> torch.Tensor:
        tensor = to_tensor(part)
        wanted = dtype if tensor.is_floating_point() else None
        return tensor.to(device, wanted, non_blocking=device.type != "cpu")

    inputs: Inputs = map_inputs(move, X)
    return inputs


def fits(X: Inputs | IndexedRows, device: torch.device) -> bool:
    """Whether inputs may live on the device for a whole fit: at most a quarter of what is free."""
    if isinstance(X, IndexedRows):
        return False
    if device.type == "cpu":
        return True
    return 4 * sum(int(part.nbytes) for part in parts_of(X)) <= free_bytes(device)
