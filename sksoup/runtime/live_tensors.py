"""Count the bytes of tensors that are alive: memory that can be asserted, not only watched."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from .shards import own


class LiveTensors(TorchFunctionMode):
    """Sum the bytes of tensors made in this context and still alive, and keep the peak.

    Left out are activations, what autograd makes, and the storages of ``ignored`` tensors.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.peak = 0
        self._alive: dict[int, int] = {}  # storage -> bytes
        self._depth = 0  # of forward passes
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_forward),
            register_module_forward_hook(self._leave_forward, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    @property
    def now(self) -> int:
        """Bytes alive at present."""
        return sum(self._alive.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result) if self._depth == 0 else ():
            if tensor.is_meta:
                continue
            storage = own(tensor).untyped_storage()
            key = storage.data_ptr()
            if key and key not in self._alive and key not in self._ignored:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key, None)
                self.peak = max(self.peak, self.now)
        return result

    def _enter_forward(self, *_: Any) -> None:
        self._depth += 1

    def _leave_forward(self, *_: Any) -> None:
        self._depth -= 1


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
