"""One input or several: what a module is fed, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

# what a module is fed: f(X), f(**X) or f(*X)
Inputs: TypeAlias = torch.Tensor | dict[str, torch.Tensor] | tuple[torch.Tensor, ...]


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
