"""Minibatch gradient descent on the coefficients of one model batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..data.rows import Batch, HeldOut
from ..runtime.cache import Memo
from ..runtime.distributed import from_first, n_ranks, share, sum_over_ranks
from .batch_norm import batch_statistics, check_rows, statistics
from .deltas import FlatModule, resolve_delta_dtype
from .objective import Objective, module_dtype
from .problem import Problem, Step


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
    weight_decay: float = 0.0
    average: bool = False  # over the second half of the steps


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
    models: Callable[[], Models],
    problem: Problem,
    coef: Callable[[], torch.Tensor],
    leaves: Sequence[torch.Tensor],
    settings: Settings,
    generator: torch.Generator,
    memo: Memo,
    *,
    scale: torch.Tensor | None = None,
    choose: HeldOut | None = None,
    on_epoch: Step,
) -> list[dict[str, Any]]:
    """Minimise the held-out loss of ``start + sum_k coef_k delta_k`` over ``leaves``.

    ``coef()`` gives (b, n_searched) as a function of the leaves. A step is one forward/backward of
    one model on ``accumulate`` minibatches, a `combine` and a `project`. Returns one record per
    epoch, with its loss and gradient norm at every step. The leaves are left at the last iterate,
    at the mean of the second half (``settings.average``), or at the epoch's end, or the start,
    where the loss on the rows ``choose`` was least. An epoch that ``memo`` knows is not run again:
    what it left the leaves, the optimizer and the generator at is restored. ``models()`` is asked
    for only when one has to be run.
    """
    n_steps = problem.data.n_batches(settings.batch_size, settings.accumulate) * settings.max_epochs
    optimizer = _optimizer(leaves, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings.schedule, n_steps))
    state = _State(leaves, optimizer, scheduler, generator, n_steps)
    layers, records = problem.layers, []

    def combined() -> None:
        models().combine(layers.expand_columns(coef().detach()))

    def loss_to_choose_by() -> float:
        combined()
        rows = problem.data if choose is None else choose
        with normalizing(problem.module, settings):
            return problem.objective.mean_loss(rows, settings.batch_size)

    best: tuple[float, list[torch.Tensor]] | None = None
    if choose is not None:
        best = memo(("loss at the start",), loss_to_choose_by), state.copy()
    for epoch in range(settings.max_epochs):
        if (known := memo.find("epoch", epoch)) is not None:
            state.restore(known["state"])
            record = known["record"]
        else:
            record = {"epoch": epoch, **_epoch(models(), problem, coef, settings, state, scale)}
            if best is not None:
                record["validation_loss"] = loss_to_choose_by()
            memo.keep({"record": record, "state": state.snapshot()}, "epoch", epoch)
        records.append(record)
        if best is not None and record["validation_loss"] < best[0]:
            best = record["validation_loss"], state.copy()
        on_epoch(combined)
    if best is not None:
        state.put(best[1])
    elif settings.average:
        state.put(state.means)
    return records


class _State:
    """All that an epoch changes."""

    def __init__(
        self,
        leaves: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        generator: torch.Generator,
        n_steps: int,
    ) -> None:
        self.leaves = leaves
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.generator = generator
        self.n_steps = n_steps
        self.means = self.copy()  # of the leaves, over the second half of the steps

    def copy(self) -> list[torch.Tensor]:
        return [leaf.detach().clone() for leaf in self.leaves]

    @torch.no_grad()
    def put(self, values: Sequence[torch.Tensor]) -> None:
        for leaf, value in zip(self.leaves, values, strict=True):
            leaf.copy_(value)

    @torch.no_grad()
    def step(self, average: bool) -> None:
        """Take a step of the optimizer and the schedule."""
        self.optimizer.step()
        self.scheduler.step()
        n = self.scheduler.last_epoch - self.n_steps // 2  # steps the mean is over
        if average and n > 0:
            for mean, leaf in zip(self.means, self.leaves, strict=True):
                mean.lerp_(leaf, 1 / n)

    def snapshot(self) -> dict[str, Any]:
        scheduler = self.scheduler.state_dict()
        return {
            "leaves": self.copy(),
            "means": [mean.clone() for mean in self.means],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {name: scheduler[name] for name in ("last_epoch", "_last_lr")},
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Any]) -> None:
        self.put(snapshot["leaves"])
        self.means = [
            mean.to(leaf) for mean, leaf in zip(snapshot["means"], self.leaves, strict=True)
        ]
        self.optimizer.load_state_dict(snapshot["optimizer"])
        self.scheduler.load_state_dict(self.scheduler.state_dict() | snapshot["scheduler"])
        self.generator.set_state(snapshot["generator"])


def _epoch(
    models: Models,
    problem: Problem,
    coef: Callable[[], torch.Tensor],
    settings: Settings,
    state: _State,
    scale: torch.Tensor | None,
) -> dict[str, list[float]]:
    """One walk over the rows: loss, gradient norm and, but for a regression, score of each step."""
    layers, leaves, counts = problem.layers, state.leaves, problem.objective.counts
    limit = math.inf if settings.clip_grad_norm is None else settings.clip_grad_norm
    before = coef().detach()
    told, norms = [], []
    shuffled = state.generator if settings.shuffle else None
    batches = problem.data.batches(settings.batch_size, shuffled, share)
    with normalizing(problem.module, settings):
        for together in batched(batches, settings.accumulate):
            c = coef()  # (b, n_searched), a graph of a few numbers
            models.combine(layers.expand_columns(c.detach()))
            models.flat.grad.zero_()
            state.optimizer.zero_grad()
            told.append(_loss_and_backward(problem.objective, together, scale))
            gradient = sum_over_ranks(models.project(layers.n_searched))  # (b, n_searched)
            c.backward(gradient.to(c))  # type: ignore[no-untyped-call]
            _reduce_scale(scale)
            counts.n_reduced += (gradient.numel() + (scale is not None)) * (n_ranks() > 1)
            norms.append(torch.nn.utils.clip_grad_norm_(leaves, limit))
            state.step(settings.average)
    steps, norm = sum_over_ranks(torch.stack(told)), torch.stack(norms)  # fetched at once
    loss, score = steps[:, 0], steps[:, 1:]  # (n_steps,), (n_steps, 1 or 0)
    finite = torch.isfinite(loss) & torch.isfinite(norm).to(loss.device)
    if not bool(finite.all()) or not bool(torch.isfinite(coef()).all()):
        bad = torch.cat([~finite, finite.new_ones(1)]).nonzero()[0]
        done = state.scheduler.last_epoch - len(told)
        step = done + min(int(bad) + 1, len(told))
        raise NotFiniteError(step, before.cpu().double().numpy())
    scores = {"score": score[:, 0].tolist()} if score.numel() else {}
    return {"loss": loss.tolist(), "grad_norm": norm.tolist(), **scores}


def normalizing(module: nn.Module, settings: Settings) -> AbstractContextManager[None]:
    """Have BatchNorm use the minibatch's statistics, where those of the soup will be measured."""
    return batch_statistics(module) if settings.normalize_by_batch else nullcontext()


def _reduce_scale(scale: torch.Tensor | None) -> None:
    """Sum the ranks' gradients of the temperature, where it is learnt."""
    if scale is not None and scale.requires_grad:
        scale.grad = torch.zeros_like(scale) if scale.grad is None else scale.grad
        sum_over_ranks(scale.grad)


def _loss_and_backward(
    objective: Objective, together: Sequence[Batch], scale: torch.Tensor | None
) -> torch.Tensor:
    """`Objective.loss_and_backward` of a few minibatches, or this rank's part, as if one."""
    if len(together) == 1 and n_ranks() == 1:
        return objective.loss_and_backward(together[0], scale)
    total = sum(batch.total for batch in together)
    total = total.clamp_min(1e-12) if isinstance(total, torch.Tensor) else total
    losses = [
        objective.loss_and_backward(batch, scale, batch.amount / total)
        for batch in together
        if len(batch)
    ]
    if not losses:  # fewer rows than ranks
        n = 1 + objective.has_score
        return torch.zeros(n, dtype=module_dtype(objective.module), device=together[0].y.device)
    return torch.stack(losses).sum(dim=0)


T = TypeVar("T")


def batched(items: Iterator[T], n: int) -> Iterator[tuple[T, ...]]:
    """The items n at a time; the last few may be fewer."""
    while group := tuple(islice(items, n)):
        yield group


def _optimizer(leaves: Sequence[torch.Tensor], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(leaves, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(leaves, lr=settings.lr, weight_decay=settings.weight_decay)


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
    if not (isinstance(soup.lr, Real) and math.isfinite(soup.lr) and float(soup.lr) > 0):
        raise ValueError(f"lr must be a finite number > 0, got {soup.lr!r}.")
    if soup.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {soup.precision!r}.")
    resolve_delta_dtype(soup.delta_dtype, torch.float32)
    for name in ("max_epochs", "model_epochs", "accumulate"):
        value = getattr(soup, name, 1)
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    clip = soup.clip_grad_norm
    if clip is not None and not (isinstance(clip, Real) and float(clip) > 0):
        raise ValueError(f"clip_grad_norm must be None or > 0, got {clip!r}.")


def check_search(soup: Any, problem: Problem, *parts: HeldOut) -> None:
    """Check what only the module and the rows tell about a search by descent."""
    if soup.batch_norm != "recalibrate":
        return
    for rows in parts:
        check_rows(problem.module, len(rows), soup.batch_size)
    if n_ranks() > 1 and statistics(problem.module):
        raise ValueError(
            "batch_norm='recalibrate' normalises by each minibatch, which the ranks of a "
            "distributed job share out. Search with batch_norm='auto' or 'average'."
        )


def memo_of(soup: Any, problem: Problem, *settings: Any) -> Memo:
    """The memory for all that tells one search by descent from another, beside batch and seed."""
    if not problem.memo:  # checkpoints in memory would be hashed for nothing
        return problem.memo
    return problem.memo.within(
        type(soup).__name__,
        [problem.checkpoints.identity(name) for name in problem.checkpoints],
        problem.layers.rows,
        problem.objective.criterion,
        vars(settings_of(soup)),
        soup.precision,
        soup.compile,
        str(soup.delta_dtype),
        *settings,
    )


def halve(n_models: int, memo: Memo) -> int:
    """Half as many models, which is remembered."""
    half = -(-n_models // 2)
    memo.keep(half, "halved", n_models)
    return half


def what_fitted(n_models: int, memo: Memo) -> int:
    """As many models as were left after the halvings of an earlier fit."""
    while (half := memo.find("halved", n_models)) is not None:
        n_models = half
    return n_models


def settings_of(soup: Any) -> Settings:
    """The `Settings` in a recipe's parameters."""
    return Settings(
        soup.optimizer,
        soup.schedule,
        float(soup.lr),
        int(soup.max_epochs),
        None if soup.batch_size is None else int(soup.batch_size),
        soup.clip_grad_norm,
        soup.shuffle,
        int(soup.accumulate),
        soup.batch_norm == "recalibrate",
        float(getattr(soup, "weight_decay", 0.0)),
        getattr(soup, "average", False),
    )


def private_generator(random_state: Any) -> torch.Generator:
    """A generator of its own: an int seeds it, a RandomState is drawn from, None is entropy."""
    generator = torch.Generator()
    if random_state is None:
        generator.seed()
    elif hasattr(random_state, "randint"):
        generator.manual_seed(int(random_state.randint(2**31)))
    elif isinstance(random_state, Integral):
        generator.manual_seed(int(random_state))
    else:
        raise TypeError(
            f"random_state must be None, an int or a numpy RandomState, got {random_state!r}."
        )
    return generator


def remembered_generator(random_state: Any, memo: Memo) -> torch.Generator:
    """Make the generator of a search: without a seed the one it began with; one for all ranks."""
    generator = private_generator(random_state)
    seed = generator.get_state()
    if random_state is None:
        seed = memo(("seed",), lambda: seed)
    return generator.set_state(from_first(seed))


def coefficient_dtype(device: torch.device) -> torch.dtype:
    """Coefficients are few: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
