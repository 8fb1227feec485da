"""Limits for building the module of a checkpoint: size, time and memory."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from ..exceptions import CheckpointError
from .protocol import TensorInfo

SECONDS = 60  # to build on 'meta'; the largest transformers models take a few seconds
SECONDS_PER_TENSOR, MOST_TENSORS = 0.02, 10_000  # more of them add nothing
MEMORY = 2 << 30  # bytes, while building


@contextmanager
def bounded_growth(header: Mapping[str, TensorInfo], path: Path) -> Iterator[None]:
    """Stop modules that make or register many more tensors than the weights have; use it on 'meta'.

    The limits are 8 times the elements of the weights and 20 modules per tensor: a shared embedding
    is registered several times (mT5: 5.5 times the elements), and not all modules have tensors (at
    most 6 modules per tensor in transformers 5.23). Tensors that the weights lack (masks, untrained
    heads) are added to the limits. For the elements of all results on the way, such as tables that
    are not registered, the limit is four times as high: masks are made in several steps.
    """
    elements = 8 * sum(info.size for info in header.values()) + (1 << 26)
    most = {
        "elements": elements,
        "elements in results on the way": 4 * elements,
        "modules": 20 * len(header) + 2_000,
    }
    grown = dict.fromkeys(most, 0)
    here = threading.get_ident()  # hooks are called for modules of all threads

    def grow(unit: str, by: int) -> None:
        if threading.get_ident() == here:
            grown[unit] += by
            if grown[unit] > most[unit]:
                raise CheckpointError(
                    f"{str(path)!r} describes a module larger than its weights: it has more than "
                    f"{most[unit]} {unit}, but the weights have {len(header)} tensors. Correct the "
                    f"file, or pass module=build_model."
                )

    def tensor(module: Any, name: str, value: torch.Tensor | None) -> None:
        grow("elements", 0 if value is None else value.numel())

    def child(module: Any, name: str, value: Any) -> None:
        grow("modules", 1)

    with ExitStack() as stack:
        stack.enter_context(_Results(lambda n: grow("elements in results on the way", n)))
        stack.callback(register_module_parameter_registration_hook(tensor).remove)
        stack.callback(register_module_buffer_registration_hook(tensor).remove)
        stack.callback(register_module_module_registration_hook(child).remove)
        yield


class _Results(TorchFunctionMode):
    """Passes the number of elements of each new result of a function of torch to ``count``."""

    def __init__(self, count: Callable[[int], None]) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and not any(part is given for given in args):
                stored = part.untyped_storage().nbytes() // part.itemsize  # fewer if expanded
                self.count(min(part.numel(), stored))
        return result


class _Stopped(BaseException):
    """Ends the building thread; ``except Exception`` does not catch it."""


@contextmanager
def bounded_work(n_tensors: int, path: Path) -> Iterator[None]:
    """Stop building a module that takes too long or too much memory before it has tensors.

    Many config fields control loops in Python, and no list of them is complete. A watching thread
    raises an exception between two bytecode instructions of the building thread.
    """
    here, done, fired = threading.get_ident(), threading.Event(), threading.Event()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    deadline = time.monotonic() + SECONDS + SECONDS_PER_TENSOR * min(n_tensors, MOST_TENSORS)
    most = _resident() + MEMORY
    lock = threading.Lock()

    def watch() -> None:
        while not done.wait(0.1):
            if time.monotonic() > deadline or _resident() > most:
                with lock:
                    if not done.is_set():
                        fired.set()
                        raise_in(ctypes.c_ulong(here), ctypes.py_object(_Stopped))
                return

    threading.Thread(target=watch, name="sksoup-build-watch", daemon=True).start()
    stopped, failure = False, None
    try:
        try:
            yield
        except _Stopped:
            stopped = True
        except BaseException as error:
            failure = error
        with lock:
            done.set()
        # pending: canceling it with None would leave a permanent signal in Python 3.11; a finalizer
        # may have swallowed it
        patience = time.monotonic() + 1
        while fired.is_set() and not stopped and time.monotonic() < patience:
            time.sleep(0.001)
    except _Stopped:
        stopped = True
    if failure is not None and not stopped:
        raise failure
    if stopped:
        raise CheckpointError(
            f"{str(path)!r} describes a module that takes too long or too much memory to build "
            f"(more than {SECONDS} s or {MEMORY >> 30} GiB without any weights). Correct the file, "
            f"or pass module=build_model."
        )


def _resident() -> int:
    """Memory of the process in bytes; 0 if unknown."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
