"""BatchNorm's running statistics: mixed like the weights, or re-estimated from held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ..data.rows import HeldOut
from .objective import Objective

BatchNormPolicy: TypeAlias = Literal["average", "recalibrate", "auto"]
POLICIES = ("average", "recalibrate", "auto")
KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(module: nn.Module) -> dict[str, Any]:
    """The layers that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, KINDS) and layer.running_mean is not None
    }


def statistics(module: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that `recalibrate` re-estimates."""
    names = batch_norms(module)
    stored = ("running_mean", "running_var")
    return tuple(f"{name}.{which}" if name else which for name in names for which in stored)


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the statistics of the minibatch, gradient included; keep the running ones."""
    with _training(batch_norms(module), momentum=0.0):
        yield


@torch.no_grad()
def recalibrate(objective: Objective, data: HeldOut, batch_size: int | None) -> None:
    """Set the running statistics to the mean of those of minibatches of all rows.

    In a fixed random order: rows that come sorted by label would give too small variances. Dropout
    stays off (``torch.optim.swa_utils.update_bn`` turns it on).
    """
    layers = batch_norms(objective.module)
    with _training(layers, momentum=None):
        for layer in layers.values():
            layer.reset_running_stats()
        for batch in data.batches(batch_size, torch.Generator().manual_seed(0)):
            if len(batch) > 1:  # one row has no variance
                objective.run(batch.X)
                objective.counts.rows_recalibrated += len(batch)


@contextmanager
def _training(layers: dict[str, Any], momentum: float | None) -> Iterator[None]:
    """Have these layers normalise by the minibatch, and nothing else behave as in training."""
    before = {
        name: (layer.momentum, layer.num_batches_tracked.clone()) for name, layer in layers.items()
    }
    for layer in layers.values():
        layer.momentum = momentum
        layer.train()
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.momentum = before[name][0]
            layer.num_batches_tracked.copy_(before[name][1])
            layer.eval()


def can_recalibrate(n_rows: int, batch_size: int | None) -> bool:
    """Whether any minibatch has two rows: one has no variance."""
    return min(n_rows, n_rows if batch_size is None else batch_size) > 1


def check_rows(module: nn.Module, n_rows: int, batch_size: int | None) -> None:
    """Say before the search that a minibatch of one row can't be normalised."""
    size = n_rows if batch_size is None else min(batch_size, n_rows)
    if batch_norms(module) and (size == 1 or n_rows % size == 1):
        raise ValueError(
            f"batch_norm='recalibrate' normalises by the statistics of each minibatch, which one "
            f"row does not have: {n_rows} rows in minibatches of {size} leave one alone. Change "
            f"batch_size."
        )
