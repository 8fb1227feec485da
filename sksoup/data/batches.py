"""The inputs and the targets in one batch, in each of the forms that loaders give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

LABELS = ("labels", "label", "targets", "target", "y")  # keys that hold targets


def split(batch: Any, y: Any, n_inputs: int | None, is_collated: bool = False) -> tuple[Any, Any]:
    """The inputs in a batch, and the targets if it contains them.

    ``n_inputs`` is the number of inputs by position, if known. With ``is_collated``, the batch is
    from torch's default collate: of rows that are lists, it returns lists of what all rows have at
    one position.
    """
    if isinstance(batch, Mapping):
        key = y if isinstance(y, str) else next((name for name in LABELS if name in batch), None)
        if key is not None and key not in batch:
            raise ValueError(
                f"Batches have no {key!r}, but only {', '.join(map(repr, batch))}. Pass the key of "
                f"the targets: y='...'."
            )
        inputs = {name: _tensor(part, is_collated) for name, part in batch.items() if name != key}
        return inputs, None if key is None else batch[key]
    if isinstance(batch, (tuple, list)):
        if isinstance(y, str):
            raise ValueError(f"y={y!r} names a key, but batches are a {type(batch).__name__}.")
        if _is_nested(batch, n_inputs, is_collated):  # ((a, b), y) is read as (a, b, y)
            first, *targets = batch
            batch, n_inputs = [*first, *targets], len(first)
        *parts, last = batch
        if y is not None or not parts or len(batch) == n_inputs:  # the batch contains no targets
            parts, last = [*parts, last], None
        if len(parts) == 1 and isinstance(parts[0], Mapping):
            return {name: _tensor(part, is_collated) for name, part in parts[0].items()}, last
        tensors = tuple(_tensor(part, is_collated) for part in parts)
        return tensors[0] if len(tensors) == 1 else tensors, last
    return _tensor(batch), None


def _is_nested(batch: Sequence[Any], n_inputs: int | None, is_collated: bool) -> bool:
    """Whether the first item is several inputs, rather than one input as a list of its rows."""
    first, *targets = batch
    if not isinstance(first, (tuple, list)) or len(targets) > 1:
        return False
    if not all(isinstance(part, (torch.Tensor, np.ndarray)) for part in first):
        return False
    if not any(part.ndim > 1 for part in first):  # numbers: a list of them is one input
        return False
    if is_collated:
        return True
    n = len(targets[0]) if targets else len(first[0])
    is_unclear = not targets or len(first) == n  # as many items as rows
    return all(len(part) == n for part in first) and (len(first) == n_inputs or not is_unclear)


def _tensor(part: Any, is_collated: bool = False) -> torch.Tensor:
    """One input: a tensor or an array, or a list of its rows or, if collated, of its columns."""
    if isinstance(part, torch.Tensor):
        return part.detach().cpu()
    if isinstance(part, np.ndarray):
        return torch.as_tensor(part)
    collated = part
    if isinstance(part, (list, tuple)):
        is_tensor = [isinstance(item, torch.Tensor) for item in part]
        if is_collated and all(is_tensor) and all(item.ndim == 1 for item in part):
            return torch.stack(list(part), dim=1)  # (n, n_features)
        if any(is_tensor) and (is_collated or not all(is_tensor)):
            raise TypeError(
                f"An input in the batches is a {type(part).__name__} of "
                f"{', '.join(type(item).__name__ for item in part[:5])}, expected one tensor. "
                f"Return several inputs by position, ((a, b), y) or (a, b, y), or by name, "
                f"({{'a': a, 'b': b}}, y), with a tensor for each of them."
            )
        collated = default_collate(list(part))
    if not isinstance(collated, torch.Tensor):
        raise TypeError(
            f"A batch holds a {type(part).__name__} that is not a tensor, such as "
            f"{str(part)[:40]!r}. Tokenize texts and remove other columns first."
        )
    return collated
