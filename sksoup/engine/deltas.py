"""The deltas of a model batch on the device, and the two operations a step needs of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..mixing.layers import Layers, is_variance
from ..mixing.mix import accumulate
from .objective import load_weights
from .problem import Problem

# numbers of a delta that are widened at a time, where deltas are half as wide as the weights
BLOCK = {"cpu": 1 << 15, "cuda": 1 << 20}
DELTA_DTYPES: dict[Any, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Deltas(Protocol):
    """The differences w_k - center of some checkpoints, wherever they are.

    ``coef`` is (b, n_searched), a coefficient for each of them in each searched layer.
    """

    flat: FlatModule

    def load(self, names: Sequence[str]) -> None:
        """Take these checkpoints for the next outer iteration."""

    def combine(self, coef: torch.Tensor) -> None:
        """W <- start + sum_k coef_k delta_k, in the module (Eqs. 3, 7, 8)."""

    def project(self) -> torch.Tensor:
        """(b, n_searched): the gradient's inner product with each delta (Eq. 6)."""

    def norms(self) -> torch.Tensor:
        """(b, n_searched): the length of each delta in each layer; 1 where it is 0."""

    def commit(self, coef: torch.Tensor) -> None:
        """Combine, and take the result as the start of the next outer iteration."""


@dataclass(frozen=True)
class Segment:
    """One tensor's place in a flat vector."""

    name: str
    row: int
    where: slice
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FlatLayout:
    """The tensors that differ, layer by layer in one vector, parameters before buffers."""

    segments: tuple[Segment, ...]
    n_parameters: int
    size: int
    row_slices: tuple[tuple[int, int, int], ...]  # (row, start, stop), each row contiguous

    @classmethod
    def of(cls, module: nn.Module, layers: Layers, differing: Collection[str]) -> FlatLayout:
        chosen: list[tuple[bool, int, str, torch.Tensor]] = []
        seen: set[int] = set()
        for name, value in module.state_dict(keep_vars=True).items():
            if name in differing and value.is_floating_point() and id(value) not in seen:
                seen.add(id(value))
                is_buffer = not isinstance(value, nn.Parameter)
                chosen.append((is_buffer, layers.rows[name], name, value))
        chosen.sort(key=lambda item: item[:2])  # stable: the module's order within a row
        segments: list[Segment] = []
        slices: list[tuple[int, int, int]] = []
        start = n_parameters = 0
        previous = None
        for is_buffer, row, name, value in chosen:
            stop = start + value.numel()
            segments.append(Segment(name, row, slice(start, stop), tuple(value.shape)))
            if previous == (is_buffer, row):
                slices[-1] = (row, slices[-1][1], stop)
            else:
                slices.append((row, start, stop))
            previous = (is_buffer, row)
            n_parameters = n_parameters if is_buffer else stop
            start = stop
        return cls(tuple(segments), n_parameters, start, tuple(slices))


class FlatModule:
    """A private module whose differing tensors are views into one flat vector."""

    def __init__(self, module: nn.Module, layout: FlatLayout) -> None:
        self.module = module
        self.layout = layout
        state = module.state_dict(keep_vars=True)
        tensors = [state[segment.name] for segment in layout.segments]
        example = tensors[0]
        self.weights = torch.empty(layout.size, dtype=example.dtype, device=example.device)
        self.grad = self.weights.new_zeros(layout.n_parameters)
        self._trainable = {p: p.requires_grad for p in module.parameters()}
        module.requires_grad_(False)  # what is equal everywhere needs no gradient
        for segment, tensor in zip(layout.segments, tensors, strict=True):
            self.weights[segment.where].copy_(tensor.detach().flatten())
            tensor.data = self.weights[segment.where].view(segment.shape)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
                tensor.grad = self.grad[segment.where].view(segment.shape)
        self.variances = [self.weights[s.where] for s in layout.segments if is_variance(s.name)]

    def release(self) -> None:
        """Give every tensor its own memory again and drop the gradients."""
        state = self.module.state_dict(keep_vars=True)
        for segment in self.layout.segments:
            tensor = state[segment.name]
            tensor.grad = None
            tensor.data = tensor.data.clone()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)


@dataclass(frozen=True)
class Center:
    """The point that deltas are taken from, and the module that is laid out like it."""

    flat: FlatModule
    mean: torch.Tensor  # (size,), w-bar
    checkpoints: CheckpointCollection
    layers: Layers


@contextmanager
def centered(problem: Problem) -> Iterator[Center | None]:
    """Lay the module out flat at the mean of all checkpoints; None if no parameter differs."""
    checkpoints, module, n = problem.checkpoints, problem.objective.module, len(problem.checkpoints)
    rows = dict.fromkeys(checkpoints.layout, 0)
    mean, differing = accumulate(checkpoints, np.full((1, n), 1 / n), rows, checkpoints.layout)
    load_weights(module, mean)
    layout = FlatLayout.of(module, problem.layers, differing)
    if not layout.n_parameters:
        yield None
        return
    flat = FlatModule(module, layout)
    try:
        vector = torch.empty_like(flat.weights)
        for segment in layout.segments:  # the mapping is emptied on the way
            vector[segment.where].copy_(mean.pop(segment.name).flatten())
        mean.clear()
        yield Center(flat, vector, checkpoints, problem.layers)
    finally:
        flat.release()


class ModelBatch:
    """``b`` deltas w_k - center as one (b, size) tensor, and the soup they are added to.

    Memory: b deltas, the center and the soup at the start of the outer iteration: b + 2 models, or
    b/2 + 2 with deltas of half the width, which are widened a block at a time.
    """

    def __init__(
        self,
        center: Center,
        capacity: int,
        delta_dtype: torch.dtype,
        reader: Reader | None = None,
    ) -> None:
        self.flat = center.flat
        self.layout = center.flat.layout
        self.center = center.mean  # (size,), w-bar
        self.start = center.mean.clone()  # (size,), the soup before this outer iteration
        self._layers = center.layers
        self._reader = Reader(center) if reader is None else reader
        step = self.layout.size
        self._buffer = center.mean.new_empty((capacity, step), dtype=delta_dtype)
        self.deltas = self._buffer[:0]
        if delta_dtype != center.mean.dtype:  # a block of all is at most a quarter of a model
            most = BLOCK.get(center.mean.device.type, 1 << 18)
            step = min(most, max(1024, step // (4 * capacity)))
        self._blocks = [
            (row, low, min(low + step, stop))
            for row, start, stop in self.layout.row_slices
            for low in range(start, stop, step)
        ]

    @property
    def capacity(self) -> int:
        return len(self._buffer)

    def release(self) -> None:
        """Let the memory go, whoever holds on to this object."""
        del self.center, self.start, self._buffer, self.deltas

    def load(self, names: Sequence[str]) -> None:
        """Read the deltas of these checkpoints: one sequential read of each file."""
        self.deltas = self._buffer[: len(names)]
        for delta, name in zip(self.deltas, names, strict=True):
            with self._reader.take(name) as parts:
                for segment, weights in parts:
                    center = self.center[segment.where]
                    weights = weights.to(center.device, center.dtype, non_blocking=True)
                    torch.sub(weights, center, out=delta[segment.where])

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """W <- start + sum_k coef_k delta_k, in place (Eqs. 3, 7, 8); coef is (b, n_searched)."""
        self.add(self.start, coef)
        for variance in self.flat.variances:
            variance.clamp_(min=0)

    def add(self, base: torch.Tensor, coef: torch.Tensor) -> None:
        """W <- base + sum_k coef_k delta_k; the base may be the weights themselves."""
        coef = self._layers.expand_columns(coef).to(self.center)  # (b, n_layers)
        for row, start, stop in self._blocks:  # no block outlives its line
            wide, weights = self.center.dtype, self.flat.weights[start:stop]
            deltas = self.deltas[:, start:stop].T
            torch.addmv(base[start:stop], deltas.to(wide), coef[:, row], out=weights)

    @torch.no_grad()
    def project(self) -> torch.Tensor:
        """(b, n_searched): the gradient's inner product with each delta, layer by layer (Eq. 6)."""
        gradient = self.center.new_zeros((len(self.deltas), self._layers.n_searched))
        for row, start, stop in self._blocks:
            if start < self.layout.n_parameters:
                deltas = self.deltas[:, start:stop]
                gradient[:, row] += torch.mv(deltas.to(gradient), self.flat.grad[start:stop])
        return gradient

    def norms(self) -> torch.Tensor:
        """(b, n_searched): the length of each delta in each layer; 1 where it is 0."""
        squares = self.center.new_zeros((len(self.deltas), self._layers.n_searched))
        for row, start, stop in self._blocks:
            if start < self.layout.n_parameters:
                deltas = self.deltas[:, start:stop]
                squares[:, row] += deltas.to(squares).square().sum(dim=1)
        return torch.where(squares > 0, squares.sqrt(), 1)

    def commit(self, coef: torch.Tensor) -> None:
        """Combine, and take the result as the start of the next outer iteration."""
        self.combine(coef)
        self.start.copy_(self.flat.weights)


class Reader:
    """Read checkpoints in a known order, ``n_ahead`` of them before they are needed, in a thread.

    While it waits, the operating system reads the files of the next ``window`` checkpoints into the
    page cache. Memory: ``n_ahead`` models, pinned for CUDA. Without a thread if ``n_ahead`` is 0.
    """

    def __init__(
        self, center: Center, order: Sequence[str] = (), n_ahead: int = 0, window: int = 0
    ) -> None:
        self._checkpoints, self._layout = center.checkpoints, center.flat.layout
        self._order = order
        self._window = window
        self._device = center.mean.device
        self._free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[str, torch.Tensor] | BaseException] = SimpleQueue()
        self._thread: Thread | None = None
        if n_ahead:
            pin = center.mean.is_cuda
            for _ in range(min(n_ahead, len(order))):
                vector = torch.empty(self._layout.size, dtype=center.mean.dtype, pin_memory=pin)
                self._free.put(vector)
            self._thread = Thread(target=self._run, name="sksoup-reader", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Begin to read nothing more, and wait for the thread."""
        self._order = ()
        self._free.put(None)
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def take(self, name: str) -> Iterator[Iterator[tuple[Segment, torch.Tensor]]]:
        """Give the differing tensors of the next checkpoint in the order, flat, on the CPU."""
        segments = self._layout.segments
        if self._thread is None:
            with self._checkpoints.open(name) as read:
                yield ((segment, read(segment.name).flatten()) for segment in segments)
            return
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        known, weights = item
        if known != name:  # pragma: no cover - the order is that of the search
            raise RuntimeError(f"the reader has {known!r}, asked for {name!r}")
        try:
            yield ((segment, weights[segment.where]) for segment in segments)
        finally:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # copied out of pinned memory
            self._free.put(weights)

    def _run(self) -> None:
        try:
            for index, name in enumerate(self._order):
                for following in self._order[index : index + self._window]:
                    if self._free.empty():
                        self._checkpoints.warm(following)
                weights = self._free.get()
                if weights is None or not self._order:
                    return
                with self._checkpoints.open(name) as read:
                    for segment in self._layout.segments:
                        weights[segment.where].copy_(read(segment.name).flatten())
                self._ready.put((name, weights))
        except BaseException as error:  # raised where the weights are asked for
            self._ready.put(error)


def resolve_delta_dtype(delta_dtype: str | torch.dtype | None, weights: torch.dtype) -> torch.dtype:
    """The dtype of deltas: None is that of the weights."""
    if delta_dtype is None:
        return weights
    dtype: torch.dtype = DELTA_DTYPES.get(delta_dtype, delta_dtype)
    if dtype not in DELTA_DTYPES.values():
        raise ValueError(
            f"delta_dtype must be None (that of the weights), 'float32' or 'bfloat16', got "
            f"{delta_dtype!r}."
        )
    return dtype
