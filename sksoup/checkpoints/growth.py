"""A bound on the module that is built for a checkpoint: no larger than its weights can fill."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..exceptions import CheckpointError
from .protocol import TensorInfo


@contextmanager
def bounded_growth(header: Mapping[str, TensorInfo], path: Path) -> Iterator[None]:
    """Stop modules that register far more than the weights hold; use it on the device 'meta'.

    Elements may be 8 times those of the weights, and modules 20 times their tensors: a table that
    is shared is registered several times (mT5: 5.5 times the elements), and not all modules hold
    tensors (6 times the tensors at most in transformers 5.23). What weights do not hold (masks,
    heads that are not trained yet) comes on top.
    """
    most = {
        "elements": 8 * sum(info.size for info in header.values()) + (1 << 24),
        "modules": 20 * len(header) + 2_000,
    }
    grown = dict.fromkeys(most, 0)
    here = threading.get_ident()  # the hooks are called for modules of all threads

    def grow(unit: str, by: int) -> None:
        if threading.get_ident() == here:
            grown[unit] += by
            if grown[unit] > most[unit]:
                raise CheckpointError(
                    f"{str(path)!r} describes a larger module than the weights beside it: it has "
                    f"more than {most[unit]} {unit}, for weights of {len(header)} tensors. Correct "
                    f"the file, or give module=build_model."
                )

    def tensor(module: Any, name: str, value: torch.Tensor | None) -> None:
        grow("elements", 0 if value is None else value.numel())

    def child(module: Any, name: str, value: Any) -> None:
        grow("modules", 1)

    with ExitStack() as stack:
        stack.callback(register_module_parameter_registration_hook(tensor).remove)
        stack.callback(register_module_buffer_registration_hook(tensor).remove)
        stack.callback(register_module_module_registration_hook(child).remove)
        yield
