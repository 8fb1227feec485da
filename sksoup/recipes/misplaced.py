"""Errors for checkpoints that were passed in the place of rows or targets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.arrays import parts_of
from ..data.rows import is_multiple


def refuse_order(y: Any) -> None:
    """Raise an error if checkpoints were passed as y."""
    first = y[0] if isinstance(y, (list, tuple)) and y else y
    if isinstance(first, (CheckpointCollection, nn.Module, os.PathLike)):
        raise TypeError(
            f"y is or contains a {type(first).__name__}, expected labels or targets. The "
            f"checkpoints are the first argument: fit(checkpoints, X, y)."
        )


def refuse_checkpoints(X: Any, y: Any) -> None:
    """Raise an error if X contains checkpoints, or several inputs without targets."""
    if is_multiple(X):
        lengths = {len(part) if getattr(part, "ndim", 1) else 0 for part in parts_of(X)}
        if y is not None and lengths == {len(y)}:
            return
        if isinstance(X, Mapping) and y is not None and len(lengths) == 1 and not _is_state(X):
            raise ValueError(
                f"X has the inputs {', '.join(map(repr, X))} with {lengths.pop()} rows, and y has "
                f"{len(y)} targets, expected the same number."
            )
        if y is None and isinstance(X, Mapping) and len(lengths) == 1 and not _is_state(X):
            raise ValueError(
                f"X has the inputs {', '.join(map(repr, X))} with {lengths.pop()} rows, but there "
                f"are no targets. Pass y, or add them to X under the key 'labels' (or another key, "
                f"with y='key')."
            )
    items = list(X[:1]) if isinstance(X, (list, tuple)) else [X]
    for item in items:
        is_state = isinstance(item, Mapping) and any(
            isinstance(value, torch.Tensor) for value in item.values()
        )
        if isinstance(item, (str, os.PathLike, nn.Module)) or is_state:
            texts = ", or strings, which must be tokenized first" if isinstance(item, str) else ""
            raise TypeError(
                f"X contains {'a state dict' if is_state else type(item).__name__}, expected rows "
                f"of data. These look like checkpoints{texts}. Call fit(checkpoints, X, y), or "
                f"wrap them: fit(CheckpointCollection(checkpoints, module=...), X)."
            )


def _is_state(X: Mapping[str, Any]) -> bool:
    """Whether the names are those of a state dict: with a dot, or of a single layer."""
    return any("." in name or name in ("weight", "bias") for name in X)
