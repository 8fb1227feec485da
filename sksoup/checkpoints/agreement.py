"""The requirements of a collection: unique names, scores, one architecture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..exceptions import CheckpointError
from .protocol import Entry, TensorInfo, is_text

METADATA = "__metadata__"  # the part of a safetensors header that is no tensor


def named(
    checkpoints: Iterable[Any] | Mapping[str, Any], names: Sequence[str] | None
) -> tuple[list[Any], Sequence[str] | None]:
    """Split the user's input into items and names; raise an error for a single checkpoint."""
    if isinstance(checkpoints, (str, os.PathLike)):
        raise TypeError(
            f"checkpoints={os.fspath(checkpoints)!r} is one path, expected several checkpoints. "
            f"For a folder or a pattern use CheckpointCollection.from_path(...)."
        )
    if isinstance(checkpoints, nn.Module):
        raise TypeError(
            "checkpoints is one module, expected several checkpoints. Put them in a list."
        )
    if isinstance(checkpoints, Mapping):
        if any(isinstance(value, torch.Tensor) for value in checkpoints.values()):
            raise TypeError(
                "checkpoints is one state dict, expected several checkpoints. Put them in a list."
            )
        names = tuple(checkpoints) if names is None else names
        items = list(checkpoints.values())
    elif isinstance(checkpoints, Iterable):
        items = list(checkpoints)
    else:
        raise TypeError(
            f"checkpoints must be paths, modules or state dicts, got {type(checkpoints).__name__}."
        )
    if not items:
        raise CheckpointError("No checkpoints: expected at least one path, module or state dict.")
    return items, names


def check_names(names: Sequence[str], n_checkpoints: int) -> None:
    """Raise an error for names that are too few or too many, empty, or not unique."""
    if len(names) != n_checkpoints:
        raise ValueError(
            f"names has {len(names)} entries, expected {n_checkpoints}: one per checkpoint."
        )
    wrong = next((name for name in names if not isinstance(name, str) or not name), None)
    if wrong is not None:
        raise TypeError(f"names must be non-empty strings, got {wrong!r}.")
    if odd := [name for name in names if not is_text(name)]:
        raise CheckpointError(
            f"{odd[0]!r} can't be the name of a checkpoint: it is not valid Unicode and can't be "
            f"written to a recipe. Rename the file, or pass names=."
        )
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(f"names must be unique, got {repeated[0]!r} more than once.")
    if not names:
        raise CheckpointError("No checkpoints are left: expected at least one.")


def check_scores(
    scores: Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, float] | None:
    """Known scores in the order of the names, all finite."""
    if scores is None:
        return None
    missing = [name for name in names if name not in scores]
    if missing:
        raise ValueError(
            f"scores has no entry for {', '.join(map(repr, missing[:5]))} ({len(missing)} of "
            f"{len(names)} checkpoints). Pass a score for every checkpoint, or no scores."
        )
    known = {name: float(scores[name]) for name in names}
    bad = next((name for name, score in known.items() if not np.isfinite(score)), None)
    if bad is not None:
        raise ValueError(f"scores[{bad!r}] is {known[bad]}, expected a finite number.")
    return known


def common_layout(entries: Mapping[str, Entry]) -> dict[str, TensorInfo]:
    """The tensors that all checkpoints share, with promoted dtypes; raise if they differ."""
    first = next(iter(entries.values()))
    layout = dict(first.header)
    if METADATA in layout:  # safetensors' save_file writes files that nothing can read
        raise CheckpointError(
            f"{first!r} can't be used: a tensor is named {METADATA!r}, which files of safetensors "
            f"use for themselves. Rename the tensor."
        )
    for tensor, info in layout.items():
        if info.dtype.is_complex:
            raise CheckpointError(
                f"{first!r} can't be used: {tensor!r} has a complex dtype, expected a floating or "
                f"integer one."
            )
    for name, entry in entries.items():
        try:
            _promote(layout, entry.header, first)
        except ValueError as error:
            raise CheckpointError(
                f"{entry!r} cannot join this collection: {error}. All checkpoints must share one "
                f"architecture; leave {name!r} out."
            ) from error
    return layout


def _promote(layout: dict[str, TensorInfo], header: Mapping[str, TensorInfo], first: Entry) -> None:
    """Promote the dtypes of a layout with another checkpoint's; raise ValueError if they differ."""
    if header.keys() != layout.keys():
        lacking = [tensor for tensor in layout if tensor not in header]
        extra = [tensor for tensor in header if tensor not in layout]
        differences = [
            f"it {verb} {', '.join(map(repr, keys[:5]))}"
            + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            for verb, keys in (("lacks", lacking), ("adds", extra))
            if keys
        ]
        raise ValueError(f"{' and '.join(differences)}, compared with {first!r}")
    for tensor, info in header.items():
        expected = layout[tensor]
        if info == expected:
            continue
        if info.shape != expected.shape:
            raise ValueError(
                f"{tensor!r} has shape {info.shape}, expected {expected.shape} as in {first!r}"
            )
        wrong = f"{tensor!r} has dtype {info.dtype}, "
        if info.is_floating != expected.is_floating or info.dtype.is_complex:
            kind = "a floating" if expected.is_floating else "an integer"
            raise ValueError(f"{wrong}expected {kind} one as in {first!r}")
        try:
            promoted = torch.promote_types(info.dtype, expected.dtype)
        except RuntimeError as error:  # float8 and unsigned integers promote to nothing
            raise ValueError(
                f"{wrong}which torch can't promote with {expected.dtype} as in {first!r}: convert "
                f"one of them"
            ) from error
        layout[tensor] = TensorInfo(info.shape, promoted)
