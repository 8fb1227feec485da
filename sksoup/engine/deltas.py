"""The deltas of a model batch on the device, and the two operations a step needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import torch

from ..checkpoints.protocol import Read
from ..runtime.distributed import agreed, all_reduce
from .center import Center, FlatModule, Segment

# numbers of a delta that are widened at a time, where deltas are half as wide as the weights
BLOCK = {"cpu": 1 << 15, "cuda": 1 << 20}
DELTA_DTYPES: dict[Any, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Deltas(Protocol):
    """The differences w_k - center of some checkpoints, wherever they are.

    ``coef`` is (b, n_searched), a coefficient for each of them in each searched layer.
    """

    flat: FlatModule

    def load(self, names: Sequence[str]) -> None:
        """Load these checkpoints for the next outer iteration."""

    def combine(self, coef: torch.Tensor) -> None:
        """W <- start + sum_k coef_k delta_k, in the module (Eqs. 3, 7, 8)."""

    def project(self) -> torch.Tensor:
        """(b, n_searched): the gradient's inner product with each delta (Eq. 6)."""

    def norms(self) -> torch.Tensor:
        """(b, n_searched): the length of each delta in each layer; 1 where it is 0."""

    def commit(self, coef: torch.Tensor) -> None:
        """Combine, and take the result as the start of the next outer iteration."""


class ModelBatch:
    """``b`` deltas w_k - center as one (b, size) tensor, and the soup they are added to.

    Memory: b deltas and the soup at the start of the outer iteration: b + 1 models on the device,
    or b/2 + 1 with deltas of half the width, which are widened a block at a time. The center is in
    host memory, where it is subtracted from what is read.
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
        # (size,), the soup before this outer iteration
        self.start = center.weights.to(center.flat.device, copy=True)
        self._layers = center.layers
        self._reader = Reader(center) if reader is None else reader
        step = self.layout.size
        self._buffer = self.start.new_empty((capacity, step), dtype=delta_dtype)
        self.deltas = self._buffer[:0]
        if delta_dtype != self.start.dtype:  # a block of all is at most a quarter of a model
            most = BLOCK.get(self.start.device.type, 1 << 18)
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
        """Free the memory, even if there are references to this object."""
        del self.start, self._buffer, self.deltas, self._reader

    def load(self, names: Sequence[str]) -> None:
        """Read the deltas of these checkpoints: one sequential read of each file."""
        self.deltas = self._buffer[: len(names)]
        for delta, name in zip(self.deltas, names, strict=True):
            with agreed(self.flat.is_sharded):
                self._reader.read_into(delta, name)

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """W <- start + sum_k coef_k delta_k, in place (Eqs. 3, 7, 8); coef is (b, n_searched)."""
        self.add(self.start, coef)
        for variance in self.flat.variances:
            variance.clamp_(min=0)
        self.flat.written()

    def add(self, base: torch.Tensor | None, coef: torch.Tensor) -> None:
        """W <- base + sum_k coef_k delta_k; without a base, it is added to W."""
        coef = self._layers.expand_columns(coef).to(self.start)  # (b, n_layers)
        for row, start, stop in self._blocks:  # no block outlives its line
            wide, weights = self.start.dtype, self.flat.weights_at(start, stop)
            deltas = self.deltas[:, start:stop].T
            to = weights if base is None else base[start:stop]
            torch.addmv(to, deltas.to(wide), coef[:, row], out=weights)

    @torch.no_grad()
    def project(self) -> torch.Tensor:
        """(b, n_searched): the gradient's inner product with each delta, layer by layer (Eq. 6)."""
        gradient = self.start.new_zeros((len(self.deltas), self._layers.n_searched))
        for row, start, stop in self._blocks:
            if start < self.layout.n_parameters:
                deltas = self.deltas[:, start:stop]
                grad = self.flat.grad_at(start, stop)
                gradient[:, row] += torch.mv(deltas.to(gradient), grad)
        return gradient

    def norms(self) -> torch.Tensor:
        """(b, n_searched): the length of each delta in each layer; 1 where it is 0."""
        squares = self.start.new_zeros((len(self.deltas), self._layers.n_searched))
        for row, start, stop in self._blocks:
            if start < self.layout.n_parameters:
                deltas = self.deltas[:, start:stop]
                squares[:, row] += deltas.to(squares).square().sum(dim=1)
        if self.flat.is_sharded:
            all_reduce(squares)
        return torch.where(squares > 0, squares.sqrt(), 1)

    def commit(self, coef: torch.Tensor) -> None:
        """Combine, and take the result as the start of the next outer iteration."""
        self.combine(coef)
        for _, start, stop in self.layout.row_slices:
            self.start[start:stop].copy_(self.flat.weights_at(start, stop))


class Reader:
    """Read deltas in a known order, ``n_ahead`` of them before they are needed, in a thread.

    While it waits, the operating system reads the files of the next ``window`` checkpoints into the
    page cache. Memory: ``n_ahead`` models, pinned for CUDA. Without a thread if ``n_ahead`` is 0.
    """

    def __init__(
        self, center: Center, order: Sequence[str] = (), n_ahead: int = 0, window: int = 0
    ) -> None:
        self._checkpoints, self._layout = center.checkpoints, center.flat.layout
        self._center = center.weights
        self._order = order
        self._window = window
        self._device = center.flat.device
        self._free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[str, torch.Tensor] | BaseException] = SimpleQueue()
        self._thread: Thread | None = None
        if n_ahead:
            pin = self._device.type == "cuda"
            for _ in range(min(n_ahead, len(order))):
                delta = torch.empty(self._layout.size, dtype=center.weights.dtype, pin_memory=pin)
                self._free.put(delta)
            self._thread = Thread(target=self._run, name="sksoup-reader", daemon=True)

    def begin(self) -> None:
        """Read ahead, until `close`, which is also called if this is interrupted."""
        if self._thread is not None:
            self._thread.start()

    def close(self) -> None:
        """Stop reading, and wait for the thread."""
        self._order = ()
        self._free.put(None)
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def read_into(self, out: torch.Tensor, name: str) -> None:
        """Write the delta of the next checkpoint in the order to (size,), anywhere."""
        if self._thread is None:
            with self._checkpoints.open(name) as read:
                for segment in self._layout.segments:
                    there = out[segment.where]
                    if there.device.type == "cpu":
                        self._delta(read, segment, there)
                    else:
                        there.copy_(self._delta(read, segment))
            return
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        known, delta = item
        if known != name:  # pragma: no cover - the order is that of the search
            raise RuntimeError(f"the reader has {known!r}, asked for {name!r}")
        out.copy_(delta, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # copied out of pinned memory
        self._free.put(delta)

    def _delta(self, read: Read, segment: Segment, out: torch.Tensor | None = None) -> torch.Tensor:
        center = self._center[segment.where]
        return torch.sub(read(segment.name).flatten().to(center.dtype), center, out=out)

    def _run(self) -> None:
        try:
            for index, name in enumerate(self._order):
                for following in self._order[index : index + self._window]:
                    if self._free.empty():
                        self._checkpoints.warm(following)
                delta = self._free.get()
                if delta is None or not self._order:
                    return
                with self._checkpoints.open(name) as read:
                    for segment in self._layout.segments:
                        self._delta(read, segment, delta[segment.where])
                self._ready.put((name, delta))
        except BaseException as error:  # raised where the delta is asked for
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
