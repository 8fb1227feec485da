"""What a search is given and what it gives back; ranking, which several searches begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from numpy.typing import NDArray
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.rows import HeldOut
from ..mixing.layers import Layers
from ..runtime.cache import Memo
from ..runtime.distributed import gather, n_ranks
from ..runtime.distributed import rank as rank_of
from .objective import Counts, Objective, load_weights
from .scores import Evaluation, Evaluator

# gives the weights of the soup as if the search stopped here; None: the module has them (now)
Weights: TypeAlias = Callable[[], Mapping[str, torch.Tensor] | None]


class Step(Protocol):
    """Tells scikit-learn's callbacks that a step is done; they may ask for the soup so far."""

    def __call__(self, weights: Weights | None = None) -> None: ...


@dataclass(frozen=True)
class Problem:
    """All a search may use: the checkpoints, a private module to try weights in, held-out rows."""

    checkpoints: CheckpointCollection
    layers: Layers
    data: HeldOut
    objective: Objective
    evaluate: Evaluator  # held-out score of the module's present weights
    progress: Callable[[str, int], AbstractContextManager[Step]]
    memo: Memo = field(default_factory=lambda: Memo(None))

    @property
    def module(self) -> nn.Module:
        return self.objective.module


@dataclass(frozen=True)
class Found:
    """What a search found: coefficients of the searched rows, and what else it has to tell."""

    coef: NDArray[np.float64]  # (n_searched, K)
    history: list[dict[str, Any]] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)  # fitted attributes of the recipe


@dataclass(frozen=True)
class Ranking:
    """Held-out score of every checkpoint, in collection order."""

    scores: dict[str, float]
    best: Evaluation | None  # of the first with the highest score; None where scores were known
    margins: dict[str, torch.Tensor] = field(default_factory=dict)  # (N,) each, where known


def rank(
    problem: Problem,
    step: Step,
    *,
    n_jobs: int | None = None,
    evaluate: Evaluator | None = None,
) -> Ranking:
    """Score every checkpoint on the held-out rows; known scores are taken as given.

    What the memory knows is not evaluated. Ranks of a distributed job share the others out, and so
    do workers; each has a module of its own and runs with this process's number of threads, so
    that the scores do not depend on how many there are.
    """
    checkpoints, evaluate = problem.checkpoints, evaluate or problem.evaluate
    if checkpoints.scores is not None:
        return Ranking(dict(checkpoints.scores), None)
    keys = {name: ("score", checkpoints.identity(name)) for name in checkpoints if evaluate.memo}
    known = {name: evaluate.memo.find(*key) for name, key in keys.items()}
    found = {name: Evaluation(**parts) for name, parts in known.items() if parts is not None}
    missing = [name for name in checkpoints.names if name not in found]
    n_workers = min(effective_n_jobs(n_jobs), len(missing))
    if missing and (n_ranks() > 1 or n_workers > 1):
        found |= rank_together(problem, evaluate, missing, n_workers)
    scores: dict[str, float] = {}
    margins: dict[str, torch.Tensor] = {}
    best, best_name = None, ""
    for name, following in with_following(checkpoints.names):
        if name not in found:
            found[name] = evaluate_one(checkpoints, evaluate, name, following)
        one = found.pop(name)
        scores[name] = one.score
        if one.margins is not None:
            margins[name] = one.margins
        if best is None or one.score > best.score:  # the first on ties
            best, best_name = one, name
        step(partial(checkpoints.__getitem__, best_name))
    return Ranking(scores, best, margins)


def rank_together(
    problem: Problem, evaluate: Evaluator, names: list[str], n_workers: int
) -> dict[str, Evaluation]:
    """Score checkpoints on all ranks, or in workers."""
    checkpoints, counts = problem.checkpoints, problem.objective.counts
    if n_ranks() > 1:
        mine = names[rank_of() :: n_ranks()]
        parts = gather({name: evaluate_one(checkpoints, evaluate, name, None) for name in mine})
        return {name: found for part in parts for name, found in part.items()}
    threads, found = torch.get_num_threads(), dict[str, Evaluation]()
    tasks = (
        delayed(rank_in_worker)(checkpoints.select(part), evaluate, threads)
        for part in np.array_split(np.array(names, dtype=object), n_workers)
    )
    for part, counted in Parallel(n_jobs=n_workers)(tasks):
        counts.add(counted)
        found |= part
    return found


def rank_in_worker(
    checkpoints: CheckpointCollection, evaluate: Evaluator, threads: int
) -> tuple[dict[str, Evaluation], Counts]:
    """Rank some of the checkpoints in a process or thread of its own."""
    torch.set_num_threads(threads)
    evaluate = evaluate.own()
    found = {
        name: evaluate_one(checkpoints, evaluate, name, following)
        for name, following in with_following(checkpoints.names)
    }
    return found, evaluate.objective.counts


def with_following(names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each name and the one after it; None follows the last."""
    return zip(names, [*names[1:], None], strict=True)


def evaluate_one(
    checkpoints: CheckpointCollection, evaluate: Evaluator, name: str, following: str | None
) -> Evaluation:
    """Score a checkpoint; the operating system reads the following one into its cache meanwhile."""
    load_weights(evaluate.objective.module, checkpoints[name])
    if following is not None:
        checkpoints.warm(following)
    found = evaluate_named(evaluate, name)
    if evaluate.memo:
        evaluate.memo.keep(vars(found), "score", checkpoints.identity(name), everywhere=True)
    return found


def evaluate_named(evaluate: Callable[[], Evaluation], what: str) -> Evaluation:
    """Evaluate; an error says what was being scored."""
    try:
        found = evaluate()
    except Exception as error:
        error.add_note(f"This was raised while {what!r} was scored on the held-out rows.")
        raise
    if math.isnan(found.score):
        raise ValueError(
            f"The held-out score of {what!r} is not a number on these rows (n_samples = "
            f"{found.n_rows}), so it can't be compared. Change scoring, or hold out rows it is "
            f"defined on."
        )
    return found
