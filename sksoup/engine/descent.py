"""Gradient descent on coefficients: steps, epochs, storage of deltas, halving, replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.rows import HeldOut
from ..exceptions import DivergenceError
from ..runtime.cache import Cache
from ..runtime.distributed import all_reduce, broadcast, share, smallest, world_size
from ..runtime.memory import Budget, is_out_of_memory
from .batch_norm import batch_statistics
from .center import Anchor, Center, centered
from .deltas import Deltas, ModelBatch, Reader, resolve_delta_dtype
from .low_rank import LowRankBatch
from .problem import Found, Problem, Step
from .streamed import StreamedBatch

Coef: TypeAlias = NDArray[np.float64]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
SCHEDULES = ("cosine", "constant")  # see `lr_factor`
LEAST_SCALE = 0.01  # of the logits; steps past 0 would turn the probabilities round

# ------------------------------------------------------------------------------- descent


@dataclass(frozen=True)
class Settings:
    """How to descend; the same for all recipes that do."""

    optimizer: str
    schedule: str
    lr: float
    max_epochs: int
    batch_size: int | None
    shuffle: bool
    accumulate: int
    normalize_by_batch: bool  # BatchNorm, during the search
    weight_decay: float = 0.0


class Descent:
    """Minimizes the held-out loss over the coefficients of some deltas, by minibatch steps.

    With ``aside``, rows that are excluded from the gradients, a run returns to the epoch (or the
    start) with the lowest loss on them.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        generator: torch.Generator,
        aside: HeldOut | None = None,
    ) -> None:
        self.problem, self.settings = problem, settings
        self.generator = generator  # of the order of the rows
        self.aside = aside
        # BatchNorm uses the minibatch's statistics where the soup's will be measured
        batchwise = partial(batch_statistics, problem.objective.module)
        self._normalizing = batchwise if settings.normalize_by_batch else nullcontext

    @property
    def n_steps(self) -> dict[str, int]:
        """Steps of a run: the product of these."""
        together = self.settings.accumulate
        what = "minibatches" if together == 1 else f"groups_of_{together}_minibatches"
        n = self.problem.data.n_batches(self.settings.batch_size, together)
        return {"epochs": self.settings.max_epochs, what: n}

    def run(
        self,
        deltas: Deltas,
        coef: Callable[[], torch.Tensor],
        leaves: Sequence[torch.Tensor],
        *,
        soup_coef: Callable[[Coef], Coef],
        step: Step,
        cache: Cache | None = None,
        scale: torch.Tensor | None = None,
        where: str = "",
    ) -> list[dict[str, Any]]:
        """Minimize the loss of ``start + sum_k coef_k delta_k`` over ``leaves``, in place.

        ``coef()`` gives (b, n_searched) as a function of the leaves, ``soup_coef`` turns that into
        the coefficients (n_searched, K) of the whole soup. Returns one record per epoch, with its
        loss and gradient norm at every step. ``scale``, if given, multiplies the outputs, is one of
        the leaves, and stays positive. A cached epoch is not run again; the leaves, the optimizer
        and the generator are restored from the cache.
        """
        settings, data = self.settings, self.problem.data
        n_steps = math.prod(self.n_steps.values())
        state = State(leaves, settings, n_steps, self.generator)

        def combine() -> None:
            deltas.combine(coef().detach())

        def loss_aside() -> float:
            combine()
            rows = data if self.aside is None else self.aside
            with self._normalizing():
                return self.problem.objective.mean_loss(rows, settings.batch_size)

        records: list[dict[str, Any]] = []
        best: tuple[float, list[torch.Tensor]] | None = None
        if self.aside is not None:
            key = ("loss at the start",)
            best = (loss_aside() if cache is None else cache(key, loss_aside)), state.copy()
        for epoch in range(settings.max_epochs):
            known = None if cache is None else cache.find("epoch", epoch)
            if known is not None:
                state.restore(known["state"])
                record = known["record"]
            else:
                before = coef().detach().cpu().double().numpy()
                record = {"epoch": epoch, **self._epoch(deltas, coef, state, scale)}
                if (bad := state.not_finite(record, coef())) is not None:
                    raise DivergenceError(
                        f"The loss or the coefficients became NaN or infinite at {where}step "
                        f"{bad}. Lower lr (now {settings.lr}).",
                        self.problem.layers.expand(soup_coef(before)),
                    )
                if best is not None:
                    record["validation_loss"] = loss_aside()
                if cache is not None:
                    cache.keep({"record": record, "state": state.snapshot()}, "epoch", epoch)
            records.append(record)
            if best is not None and record["validation_loss"] < best[0]:
                best = record["validation_loss"], state.copy()
            step(combine)
        if best is not None:
            state.put(best[1])
        return records

    def _epoch(
        self,
        deltas: Deltas,
        coef: Callable[[], torch.Tensor],
        state: State,
        scale: torch.Tensor | None,
    ) -> dict[str, list[float]]:
        """One walk over the rows: loss, gradient norm and, if there is one, score of each step."""
        settings, objective = self.settings, self.problem.objective
        shuffled = self.generator if settings.shuffle else None
        batches = self.problem.data.batches(
            settings.batch_size, shuffled, share, needs_one=objective.is_sharded
        )
        measured, norms = [], []
        with self._normalizing():
            while together := tuple(islice(batches, settings.accumulate)):
                c = coef()  # (b, n_searched), a graph of a few numbers
                deltas.combine(c.detach())
                deltas.flat.forget_grad()
                state.optimizer.zero_grad()
                measured.append(objective.loss_and_backward(together, scale))
                gradient = all_reduce(deltas.project())  # (b, n_searched)
                c.backward(gradient.to(c))  # type: ignore[no-untyped-call]
                if world_size() > 1:
                    objective.counts.n_reduced += gradient.numel() + (scale is not None)
                    if scale is not None and scale.requires_grad:
                        scale.grad = torch.zeros_like(scale) if scale.grad is None else scale.grad
                        all_reduce(scale.grad)
                norms.append(torch.nn.utils.clip_grad_norm_(state.leaves, math.inf))  # measures
                state.optimizer.step()
                if scale is not None:
                    with torch.no_grad():
                        scale.clamp_(min=LEAST_SCALE)
                state.scheduler.step()
        steps, norm = all_reduce(torch.stack(measured)), torch.stack(norms)  # fetched at once
        scores = {"score": steps[:, 1].tolist()} if objective.has_score else {}
        return {"loss": steps[:, 0].tolist(), "grad_norm": norm.tolist(), **scores}


class State:
    """All that an epoch changes."""

    def __init__(
        self,
        leaves: Sequence[torch.Tensor],
        settings: Settings,
        n_steps: int,
        generator: torch.Generator,
    ) -> None:
        self.leaves = leaves
        self.optimizer = OPTIMIZERS[settings.optimizer](
            leaves, lr=settings.lr, weight_decay=settings.weight_decay
        )
        factor = partial(lr_factor, settings.schedule, n_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.generator = generator

    def copy(self) -> list[torch.Tensor]:
        """The leaves as they are now."""
        return [leaf.detach().clone() for leaf in self.leaves]

    @torch.no_grad()
    def put(self, values: Sequence[torch.Tensor]) -> None:
        """Set the leaves."""
        for leaf, value in zip(self.leaves, values, strict=True):
            leaf.copy_(value)

    def not_finite(self, record: dict[str, list[float]], coef: torch.Tensor) -> int | None:
        """The step, counted from 1, at which loss or gradient became NaN or infinite, or None."""
        steps = zip(record["loss"], record["grad_norm"], strict=True)
        n = len(record["loss"])
        finite = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in steps]
        if all(finite) and bool(torch.isfinite(coef).all()):
            return None
        done = int(self.scheduler.last_epoch) - n
        return done + min([*finite, False].index(False) + 1, n)

    def snapshot(self) -> dict[str, Any]:
        """All of it, for the cache."""
        scheduler = self.scheduler.state_dict()
        return {
            "leaves": self.copy(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {name: scheduler[name] for name in ("last_epoch", "_last_lr")},
            "generator": self.generator.get_state(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Set all to what `snapshot` returned."""
        self.put(snapshot["leaves"])
        self.optimizer.load_state_dict(snapshot["optimizer"])
        self.scheduler.load_state_dict(self.scheduler.state_dict() | snapshot["scheduler"])
        self.generator.set_state(snapshot["generator"])


def lr_factor(schedule: str, n_steps: int, step: int) -> float:
    """Factor on the learning rate; cosine after a warm-up over a fifth of the steps."""
    if schedule == "constant":
        return 1.0
    warm = max(1, n_steps // 5)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


def private_generator(random_state: Any, cache: Cache | None) -> torch.Generator:
    """A generator for ``random_state``, rank 0's for all; entropy is kept in the cache."""
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
    if random_state is None and cache is not None:
        generator.set_state(cache(("seed",), generator.get_state))
    return generator.set_state(broadcast(generator.get_state()))


def coefficient_dtype(device: torch.device) -> torch.dtype:
    """Coefficients are few: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---------------------------------------------------------------- memory, and what is replayed


@dataclass(frozen=True)
class DeltaStorage:
    """How deltas are held, which decides how many models fit into memory."""

    limit: int | None  # bytes; None is half of what the device has free
    delta_dtype: str | torch.dtype | None
    n_ahead: int = 0  # models read before they are needed

    def n_models(self, wanted: int | str | None, center: Center) -> int:
        """How many deltas to hold: as asked, None for all, "auto" for what fits."""
        n_checkpoints, weights = len(center.checkpoints), center.weights
        if center.checkpoints.on_one_base():
            return self._n_adapters(wanted, center)
        if self.limit is None and wanted != "auto":
            return n_checkpoints if wanted is None else min(int(wanted), n_checkpoints)
        dtype = resolve_delta_dtype(self.delta_dtype, weights.dtype)
        delta_bytes = len(weights) * dtype.itemsize
        # beside the deltas the soup; and in the host's memory the center and what is read ahead
        device = center.flat.device
        n_fixed = 2 + self.n_ahead if device.type == "cpu" else 1
        budget = Budget(self.limit, weights.nbytes, delta_bytes, n_fixed, device)
        return smallest(budget.resolve(wanted, n_checkpoints))

    def _n_adapters(self, wanted: int | str | None, center: Center) -> int:
        """Of adapters the factors of all are held, however many a model batch takes."""
        weights, n = center.weights, len(center.checkpoints)
        width = resolve_delta_dtype(self.delta_dtype, weights.dtype).itemsize
        held = width * sum(one.n_numbers for one in center.checkpoints.on_one_base().values())
        if self.limit is not None and (needed := weights.nbytes + held) > self.limit:
            raise ValueError(
                f"memory_limit={self.limit:,} bytes is too small for a search over adapters, which "
                f"needs {needed:,} bytes for the base ({weights.nbytes:,}) and the factors of all "
                f"{n} adapters. Raise the limit, or use fewer adapters."
            )
        return n if wanted in (None, "auto") else min(int(wanted), n)

    @contextmanager
    def deltas(
        self, center: Center, n_models: int, batches: Sequence[Sequence[str]]
    ) -> Iterator[Deltas]:
        """Hold ``n_models`` deltas of these batches; larger batches are read at every step."""
        dtype = resolve_delta_dtype(self.delta_dtype, center.weights.dtype)
        if center.checkpoints.on_one_base():
            factors = LowRankBatch(center, dtype)
            try:
                yield factors
            finally:
                factors.release()
            return
        kind: type[ModelBatch] = ModelBatch
        n_ahead = self.n_ahead
        if any(len(batch) > n_models for batch in batches):
            kind, n_ahead = StreamedBatch, 0
        reader = Reader(center, [name for batch in batches for name in batch], n_ahead, n_models)
        held = None
        try:
            reader.begin()
            held = kind(center, n_models, dtype, reader)
            yield held
        finally:
            reader.close()
            if held is not None:
                held.release()


class NotCached(Exception):
    """Raised if a replay would have to compute something."""


class ReplayedDeltas:
    """Placeholder deltas for replaying a finished search from the cache, without reading."""

    def load(self, names: Sequence[str]) -> None:
        """Nothing is loaded."""

    def commit(self, coef: torch.Tensor) -> None:
        """Nothing is computed."""

    def __getattr__(self, name: str) -> Any:
        raise NotCached(f"{name} was asked for in a replay")


OpenDeltas: TypeAlias = Callable[[Sequence[Sequence[str]]], AbstractContextManager[Any]]
# (models in memory, ..., what each delta is multiplied by: (K, n_searched))
Search: TypeAlias = Callable[[int, OpenDeltas, Coef], Found]


def within_memory(
    problem: Problem,
    anchor: Anchor,
    search: Search,
    storage: DeltaStorage,
    wanted: int | str | None,
    cache: Cache | None,
    on_halved: Callable[[int], None] = lambda n_models: None,
) -> Found | None:
    """Run a search with as many models as fit into memory; halve the number if it runs out.

    A search that was finished by an earlier fit is replayed from the cache before any file is
    opened. Returns None if all checkpoints are equal.
    """
    key = ("models in memory", wanted, storage.limit, storage.n_ahead)
    n_models = None if cache is None else cache.find(*key)
    if cache is not None and n_models is not None:
        n_models = _after_halving(n_models, cache)
        if not n_models:
            return None
        if cache.find("finished", n_models) and (factors := cache.find("factors")) is not None:
            with suppress(NotCached):  # a callback asks for weights, or an entry is damaged
                replayed = nullcontext(ReplayedDeltas())
                return search(n_models, lambda batches: replayed, factors.numpy())
    with centered(problem, anchor, cache) as center:
        if n_models is None:
            n_models = 0 if center is None else storage.n_models(wanted, center)
            if cache is not None:
                cache.keep(n_models, *key)
                n_models = _after_halving(n_models, cache)
        while center is not None and n_models:
            try:
                found = search(n_models, partial(storage.deltas, center, n_models), center.factors)
            except (MemoryError, RuntimeError) as error:
                if n_models == 1 or world_size() > 1 or not is_out_of_memory(error):
                    raise
            else:
                if cache is not None:
                    cache.keep(True, "finished", n_models)
                return found
            half = -(-n_models // 2)
            if cache is not None:
                cache.keep(half, "halved", n_models)
            on_halved(half)
            n_models = half
            torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    return None


def _after_halving(n_models: int, cache: Cache) -> int:
    """As many models as were left after the halvings of an earlier fit."""
    while (half := cache.find("halved", n_models)) is not None and half < n_models:
        n_models = half
    return n_models
