"""BatchNorm's running statistics: mixed like the weights, or re-estimated from held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ..data.rows import HeldOut
from .objective import Objective, load_weights
from .problem import Problem

BatchNormPolicy: TypeAlias = Literal["average", "recalibrate", "auto"]
POLICIES = ("average", "recalibrate", "auto")
KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(module: nn.Module) -> dict[str, Any]:
    """The layers that keep running statistics, by name; one with several names has one here."""
    return {name: layer for name, layer in module.named_modules() if _keeps_statistics(layer)}


def _keeps_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, KINDS) and layer.running_mean is not None


def statistics(module: nn.Module) -> tuple[str, ...]:
    """All names of the tensors that `recalibrate` re-estimates."""
    layers = module.named_modules(remove_duplicate=False)
    names = [name for name, layer in layers if _keeps_statistics(layer)]
    stored = ("running_mean", "running_var")
    return tuple(f"{name}.{which}" if name else which for name in names for which in stored)


def batch_statistics(module: nn.Module) -> AbstractContextManager[None]:
    """Normalize by the statistics of the minibatch, gradient included; keep the running ones."""
    return _training(batch_norms(module), momentum=0.0)


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
                objective.forward(batch.X, recalibrating=True)


@contextmanager
def _training(layers: dict[str, Any], momentum: float | None) -> Iterator[None]:
    """Have these layers normalize by the minibatch, and nothing else behave as in training."""
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


def can_recalibrate(module: nn.Module, n_rows: int, batch_size: int | None) -> bool:
    """Whether there is BatchNorm, and minibatches of two rows or more: one has no variance."""
    return bool(batch_norms(module)) and min(n_rows, batch_size or n_rows) > 1


def check_policy(problem: Problem, batch_size: int | None) -> None:
    """Raise an error if ``batch_norm="recalibrate"`` can't measure variances."""
    module, n = problem.objective.module, len(problem.data)
    if batch_norms(module) and not can_recalibrate(module, n, batch_size):
        raise ValueError(
            f"batch_norm='recalibrate' measures the variance of minibatches, but with {n} rows and "
            f"batch_size={batch_size} each has only one row. Pass more rows, a larger batch_size, "
            f"or batch_norm='average'."
        )


def settle(problem: Problem, policy: BatchNormPolicy, batch_size: int | None) -> tuple[str, ...]:
    """Re-estimate the soup's statistics, or keep the mixed ones; gives the tensors that changed."""
    module = problem.objective.module
    if not can_recalibrate(module, len(problem.data), batch_size):
        return ()  # "auto": for "recalibrate" it was refused
    rows = problem.layers.rows  # files may hold one of several names
    names = tuple(name for name in statistics(module) if name in rows)
    state = module.state_dict()
    averages = {name: state[name].clone() for name in names}

    def measured() -> dict[str, torch.Tensor]:
        score = problem.evaluate().score if policy == "auto" else -math.inf
        recalibrate(problem.objective, problem.data, batch_size)
        is_worse = policy == "auto" and problem.evaluate().score <= score
        return {} if is_worse else {name: module.state_dict()[name].clone() for name in names}

    cache = problem.evaluate.cache
    if cache is not None:  # the key is made before the module is changed
        found = cache.within(policy, dict(state))(("batch_norm",), measured)
    else:
        found = measured()
    load_weights(module, averages | found)
    return names if found else ()
