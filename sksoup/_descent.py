"""Minibatch gradient descent on the coefficients of one model batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ._batch_norm import batch_statistics
from ._data import Batch
from ._model_batch import FlatModule, resolve_delta_dtype
from ._objective import Objective
from ._problem import Problem, Step


@dataclass(frozen=True)
class Settings:
    """How to descend; the same for all recipes that do."""

    optimizer: str
    schedule: str
    lr: float
    max_epochs: int
    batch_size: int | None
    clip_grad_norm: float | None
    shuffle: bool
    accumulate: int
    normalize_by_batch: bool  # BatchNorm, during the search


class Models(Protocol):
    """Deltas as `descend` needs them: a `ModelBatch`, or models streamed from their files."""

    flat: FlatModule

    def combine(self, coef: torch.Tensor) -> None: ...

    def project(self, n_rows: int) -> torch.Tensor: ...


class NotFiniteError(Exception):
    """The loss or the coefficients stopped being finite.

    At ``step`` (counted from 1); ``coef`` (b, n_searched) are those before that epoch.
    """

    def __init__(self, step: int, coef: NDArray[np.float64]) -> None:
        super().__init__(step)
        self.step = step
        self.coef = coef


def descend(
    models: Models,
    problem: Problem,
    coef: Callable[[], torch.Tensor],
    leaves: Sequence[torch.Tensor],
    settings: Settings,
    generator: torch.Generator,
    *,
    scale: torch.Tensor | None = None,
    on_epoch: Step,
) -> list[dict[str, Any]]:
    """Minimise the held-out loss of ``start + sum_k coef_k delta_k`` over ``leaves``.

    ``coef()`` gives (b, n_searched) as a function of the leaves. A step is one forward/backward of
    one model on ``accumulate`` minibatches, a `combine` and a `project`. Returns one record per
    epoch, with its loss and gradient norm at every step.
    """
    data, layers = problem.data, problem.layers
    per_epoch = data.n_batches(settings.batch_size, settings.accumulate)
    optimizer = _optimizer(leaves, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _schedule(settings.schedule, per_epoch * settings.max_epochs)
    )
    limit = math.inf if settings.clip_grad_norm is None else settings.clip_grad_norm
    records = []
    searching = batch_statistics(problem.module) if settings.normalize_by_batch else nullcontext()
    with searching:
        for epoch in range(settings.max_epochs):
            before = coef().detach()
            losses, norms = [], []
            batches = data.batches(settings.batch_size, generator if settings.shuffle else None)
            for together in batched(batches, settings.accumulate):
                c = coef()  # (b, n_searched), a graph of a few numbers
                models.combine(layers.expand_columns(c.detach()))
                models.flat.grad.zero_()
                optimizer.zero_grad()
                losses.append(_loss_and_backward(problem.objective, together, scale))
                c.backward(models.project(layers.n_searched).to(c))  # type: ignore[no-untyped-call]
                norms.append(torch.nn.utils.clip_grad_norm_(leaves, limit))
                optimizer.step()
                scheduler.step()
            loss, norm = torch.stack(losses), torch.stack(norms)  # fetched at once
            finite = torch.isfinite(loss) & torch.isfinite(norm).to(loss.device)
            if not bool(finite.all()) or not bool(torch.isfinite(coef()).all()):
                bad = torch.cat([~finite, finite.new_ones(1)]).nonzero()[0]
                step = epoch * per_epoch + min(int(bad) + 1, len(losses))
                raise NotFiniteError(step, before.cpu().double().numpy())
            records.append({"epoch": epoch, "loss": loss.tolist(), "grad_norm": norm.tolist()})
            on_epoch(lambda: models.combine(layers.expand_columns(coef().detach())))
    models.combine(layers.expand_columns(coef().detach()))
    return records


def _loss_and_backward(
    objective: Objective, together: Sequence[Batch], scale: torch.Tensor | None
) -> torch.Tensor:
    """The loss and gradient of a few minibatches as if they were one."""
    if len(together) == 1:
        return objective.loss_and_backward(together[0], scale)
    weights = [len(b) if b.weight is None else b.weight.sum() for b in together]
    total = torch.as_tensor(sum(weights)).clamp_min(1e-12)
    losses = [
        objective.loss_and_backward(rows, scale, weight / total)
        for rows, weight in zip(together, weights, strict=True)
    ]
    return torch.stack(losses).sum()


T = TypeVar("T")


def batched(items: Iterator[T], n: int) -> Iterator[tuple[T, ...]]:
    """The items n at a time; the last few may be fewer."""
    while group := tuple(islice(items, n)):
        yield group


def _optimizer(leaves: Sequence[torch.Tensor], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(leaves, lr=settings.lr)
    return torch.optim.AdamW(leaves, lr=settings.lr, weight_decay=0.0)


def _schedule(name: str, n_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate; cosine after a warm-up over a fifth of the steps."""
    if name == "constant":
        return lambda step: 1.0
    warm = max(1, n_steps // 5)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))

    return factor


def check_settings(soup: Any) -> None:
    """Check the parameters of a recipe that descends; say what was expected."""
    for name, choices in (
        ("optimizer", ("adamw", "sgd")),
        ("schedule", ("cosine", "constant")),
    ):
        if getattr(soup, name) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, choices))}, got "
                f"{getattr(soup, name)!r}."
            )
    if not (isinstance(soup.lr, (int, float)) and math.isfinite(soup.lr) and soup.lr > 0):
        raise ValueError(f"lr must be a finite number > 0, got {soup.lr!r}.")
    if soup.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {soup.precision!r}.")
    resolve_delta_dtype(soup.delta_dtype, torch.float32)
    for name in ("max_epochs", "model_epochs", "accumulate"):
        value = getattr(soup, name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    clip = soup.clip_grad_norm
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise ValueError(f"clip_grad_norm must be None or > 0, got {clip!r}.")


def settings_of(soup: Any) -> Settings:
    """The `Settings` in a recipe's parameters."""
    return Settings(
        soup.optimizer,
        soup.schedule,
        float(soup.lr),
        soup.max_epochs,
        soup.batch_size,
        soup.clip_grad_norm,
        soup.shuffle,
        soup.accumulate,
        soup.batch_norm == "recalibrate",
    )


def private_generator(random_state: Any) -> torch.Generator:
    """A generator of its own: an int seeds it, a RandomState is drawn from, None is entropy."""
    generator = torch.Generator()
    if random_state is None:
        generator.seed()
    elif hasattr(random_state, "randint"):
        generator.manual_seed(int(random_state.randint(2**31)))
    elif isinstance(random_state, int):
        generator.manual_seed(random_state)
    else:
        raise TypeError(
            f"random_state must be None, an int or a numpy RandomState, got {random_state!r}."
        )
    return generator


def coefficient_dtype(device: torch.device) -> torch.dtype:
    """Coefficients are few: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
