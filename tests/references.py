"""The slow obvious versions: what every fast path has to agree with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch.func import functional_call

from sksoup import CheckpointCollection


def mix_reference(
    states: list[dict[str, torch.Tensor]], coef: np.ndarray, rows: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Tensor by tensor, all checkpoints at hand, exactly as `mix` is documented."""
    coef = np.atleast_2d(coef)
    used = [k for k in range(len(states)) if coef[:, k].any()]
    mixed = {}
    for name, row in rows.items():
        ks = [k for k in used if coef[row, k] != 0]
        values = [states[k][name] for k in ks]
        dtype = values[0].dtype
        for k in used:
            dtype = torch.promote_types(dtype, states[k][name].dtype)
        if not dtype.is_floating_point:
            mixed[name] = states[int(coef.mean(axis=0).argmax())][name].clone()
        elif all(torch.equal(values[0], value) for value in values[1:]):
            mixed[name] = values[0].to(dtype)
        else:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            total = values[0].to(wide) * coef[row, ks[0]]
            for k, value in zip(ks[1:], values[1:], strict=True):
                total = total + value.to(wide) * coef[row, k]
            if name.endswith("running_var"):
                total = total.clamp(min=0)
            mixed[name] = total.to(dtype)
    return mixed


def stacked(checkpoints: CheckpointCollection) -> dict[str, torch.Tensor]:
    """All checkpoints at once: name -> (K, ...)."""
    states = list(checkpoints.values())
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def cosine_with_warmup(step: int, n_steps: int) -> float:
    warm = max(1, n_steps // 5)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


def descent_reference(
    checkpoints: CheckpointCollection,
    X: torch.Tensor,
    y: torch.Tensor,
    coef_of: Callable[..., torch.Tensor],
    leaves: list[torch.Tensor],
    *,
    layerwise: bool,
    lr: float,
    max_epochs: int,
    batch_size: int,
    schedule: str = "constant",
    scale: torch.Tensor | None = None,
    weight_decay: float = 0.0,
) -> np.ndarray:
    """Autograd through the graph over all K models; parameters only, rows in order.

    ``coef_of()`` gives (n_rows, K) coefficients of the *checkpoints*.
    """
    weights = stacked(checkpoints)
    names = list(weights)
    module = checkpoints.build_module().eval()
    optimizer = torch.optim.AdamW(leaves, lr=lr, weight_decay=weight_decay)
    n_steps = max_epochs * math.ceil(len(X) / batch_size)
    step = 0
    for _ in range(max_epochs):
        for start in range(0, len(X), batch_size):
            if schedule == "cosine":
                for group in optimizer.param_groups:
                    group["lr"] = lr * cosine_with_warmup(step, n_steps)
            c = coef_of()
            mixed = {
                name: torch.tensordot(c[row if layerwise else 0], weights[name], dims=1)
                for row, name in enumerate(names)
            }
            output = functional_call(module, mixed, (X[start : start + batch_size],))
            if scale is not None:
                output = output * scale
            loss = torch.nn.functional.cross_entropy(output, y[start : start + batch_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return coef_of().detach().numpy()


def greedy_reference(
    scores: list[float], score_of_subset: Callable[[list[int]], float]
) -> list[int]:
    """Recipe 1, word for word."""
    order = sorted(range(len(scores)), key=lambda k: scores[k], reverse=True)
    ingredients: list[int] = []
    for k in order:
        if not ingredients or score_of_subset([*ingredients, k]) >= score_of_subset(ingredients):
            ingredients.append(k)
    return ingredients


def mean_reference(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Average stacked float64 tensors and cast once; integers are the first's."""
    means = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        dtype = functools.reduce(torch.promote_types, (w.dtype for w in values))
        mean = first
        if first.is_floating_point() and not all(torch.equal(first, w) for w in values):
            mean = torch.stack([w.double() for w in values]).sum(0) / len(values)
        means[name] = (mean.clamp(min=0) if name.endswith("running_var") else mean).to(dtype)
    return means
