"""What comes in the place of rows or targets by mistake."""

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
    """Raise an error that explains it where checkpoints come where y should."""
    first = y[0] if isinstance(y, (list, tuple)) and y else y
    if isinstance(first, (CheckpointCollection, nn.Module, os.PathLike)):
        raise TypeError(
            f"y is or holds a {type(first).__name__}, expected labels or targets. The checkpoints "
            f"come first: fit(checkpoints, X, y)."
        )


def refuse_checkpoints(X: Any, y: Any) -> None:
    """Raise an error that explains it where X holds checkpoints, or inputs without targets."""
    if is_multiple(X):
        lengths = {len(part) if getattr(part, "ndim", 1) else 0 for part in parts_of(X)}
        if y is not None and lengths == {len(y)}:
            return
        if isinstance(X, Mapping) and y is not None and len(lengths) == 1 and not _is_state(X):
            raise ValueError(
                f"X has the inputs {', '.join(map(repr, X))} of {lengths.pop()} rows, and y has "
                f"{len(y)} targets: expected as many."
            )
        if y is None and isinstance(X, Mapping) and len(lengths) == 1 and not _is_state(X):
            raise ValueError(
                f"X has the inputs {', '.join(map(repr, X))} of {lengths.pop()} rows, and there "
                f"are no targets: give y, or put them into X under a key such as 'labels' (another "
                f"key is named by y='...')."
            )
    items = list(X[:1]) if isinstance(X, (list, tuple)) else [X]
    for item in items:
        is_state = isinstance(item, Mapping) and any(
            isinstance(value, torch.Tensor) for value in item.values()
        )
        if isinstance(item, (str, os.PathLike, nn.Module)) or is_state:
            texts = ", or texts, which have to be tokenised first" if isinstance(item, str) else ""
            raise TypeError(
                f"X holds {'a state dict' if is_state else type(item).__name__} where rows of data "
                f"were expected: these look like checkpoints{texts}. Call fit(checkpoints, X, y), "
                f"or wrap them: fit(CheckpointCollection(checkpoints, module=...), X)."
            )


def _is_state(X: Mapping[str, Any]) -> bool:
    """Whether names are those of a state dict: with a dot, or of what one layer holds."""
    return any("." in name or name in ("weight", "bias") for name in X)
