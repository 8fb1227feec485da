"""The background reader: checkpoints as flat vectors, ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Self

import torch

from ..checkpoints.collection import CheckpointCollection
from ..mixing.layers import FlatLayout


class Reader:
    """Read checkpoints in a known order, in one thread, ``n_ahead`` of them before they are asked.

    While it waits, it has the operating system read the files of the next ``window`` checkpoints
    into the page cache, which takes none of this process's memory. What is read, and in which
    order it is used, does not depend on timing. Memory: ``n_ahead`` models, pinned for CUDA.
    """

    def __init__(
        self,
        checkpoints: CheckpointCollection,
        layout: FlatLayout,
        order: Sequence[str],
        like: torch.Tensor,
        n_ahead: int,
        window: int,
    ) -> None:
        self._checkpoints = checkpoints
        self._layout = layout
        self._order = order
        self._window = window
        self._device = like.device
        self._free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[str, torch.Tensor] | BaseException] = SimpleQueue()
        for _ in range(n_ahead):
            self._free.put(torch.empty(layout.size, dtype=like.dtype, pin_memory=like.is_cuda))
        self._thread = Thread(target=self._run, name="sksoup-reader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._order = ()  # nothing more is begun
        self._free.put(None)
        self._thread.join()

    @contextmanager
    def take(self, name: str) -> Iterator[torch.Tensor]:
        """Give the flat weights (size,) of the next checkpoint in the order, on the CPU."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        known, weights = item
        if known != name:  # pragma: no cover - the order is that of the search
            raise RuntimeError(f"the reader has {known!r}, asked for {name!r}")
        try:
            yield weights
        finally:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # copied out of pinned memory
            self._free.put(weights)

    def _run(self) -> None:
        try:
            for index, name in enumerate(self._order):
                if self._free.empty():
                    self._warm(index)
                weights = self._free.get()
                if weights is None or not self._order:
                    return
                with self._checkpoints.open(name) as read:
                    for segment in self._layout.segments:
                        where = slice(segment.start, segment.stop)
                        weights[where].copy_(read(segment.name).flatten())
                self._ready.put((name, weights))
        except BaseException as error:  # raised where the weights are asked for
            self._ready.put(error)

    def _warm(self, index: int) -> None:
        for name in self._order[index : index + self._window]:
            if self._free.empty():
                self._checkpoints.warm(name)
