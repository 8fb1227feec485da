"""Rows set aside for a purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from .outputs import Task


def split_rows(
    y: NDArray[Any],
    task: Task,
    amounts: torch.Tensor | None,
    fraction: float,
    random_state: Any,
) -> list[torch.Tensor]:
    """Draw a fraction of the rows, stratified by label if possible; return it and the rest."""
    labels = y if task == "classification" and y.ndim == 1 else None
    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        n_drawn = int(fraction * len(y))  # as scikit-learn counts them
        if counts.min() < 2 or len(counts) > min(n_drawn, len(y) - n_drawn):
            labels = None
    if random_state is None:  # fresh entropy instead of NumPy's global state
        random_state = int(np.random.SeedSequence().generate_state(1)[0])
    parts = train_test_split(
        np.arange(len(y)), train_size=fraction, stratify=labels, random_state=random_state
    )
    if amounts is not None and not all(bool(amounts.cpu()[part].any()) for part in parts):
        raise ValueError(
            f"All {len(parts[0])} rows drawn, or all {len(parts[1])} others, have a sample_weight "
            f"of 0 or no label, so they can't be used for selection. Remove such rows, or draw "
            f"another fraction."
        )
    return [torch.as_tensor(np.sort(part)) for part in parts]
