"""What a search is given and what it gives back; ranking, which several searches begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from numpy.typing import NDArray
from torch import nn

from ._data import HeldOut
from ._evaluation import Evaluation, Evaluator
from ._layout import Layers
from ._objective import Counts, Objective, load_weights
from .checkpoints import CheckpointCollection

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

    With workers each has a module of its own and runs with this process's number of threads, so
    that the scores do not depend on how many there are.
    """
    checkpoints, evaluate = problem.checkpoints, evaluate or problem.evaluate
    if checkpoints.scores is not None:
        return Ranking(dict(checkpoints.scores), None)
    n_workers = min(effective_n_jobs(n_jobs), len(checkpoints))
    if n_workers == 1:
        return rank_some(checkpoints, evaluate, step)
    parts = np.array_split(np.array(checkpoints.names, dtype=object), n_workers)
    rankings = []
    threads = torch.get_num_threads()
    tasks = (delayed(rank_in_worker)(checkpoints.select(part), evaluate, threads) for part in parts)
    for ranking, counts in Parallel(n_jobs=n_workers)(tasks):
        problem.objective.counts.add(counts)
        rankings.append(ranking)
    scores = {name: score for ranking in rankings for name, score in ranking.scores.items()}
    margins = {name: value for ranking in rankings for name, value in ranking.margins.items()}
    best_name = checkpoints.names[0]
    for name in checkpoints:
        best_name = max(best_name, name, key=scores.__getitem__)  # the first on ties
        step(partial(checkpoints.__getitem__, best_name))
    return Ranking(scores, max((r.best for r in rankings), key=lambda best: best.score), margins)


def rank_in_worker(
    checkpoints: CheckpointCollection, evaluate: Evaluator, threads: int
) -> tuple[Ranking, Counts]:
    """Rank some of the checkpoints in a process or thread of its own."""
    torch.set_num_threads(threads)
    evaluate = evaluate.own()
    ranking = rank_some(checkpoints, evaluate, lambda weights=None: None)
    return ranking, evaluate.objective.counts


def rank_some(checkpoints: CheckpointCollection, evaluate: Evaluator, step: Step) -> Ranking:
    """Score one checkpoint after the other; the next is read while this one is evaluated.

    The operating system reads it, into its cache: no thread competes for the processor.
    """
    scores: dict[str, float] = {}
    margins: dict[str, torch.Tensor] = {}
    best, best_name = None, ""
    for index, name in enumerate(checkpoints.names):
        load_weights(evaluate.objective.module, checkpoints[name])
        for following in checkpoints.names[index + 1 : index + 2]:
            checkpoints.warm(following)
        found = evaluate_named(evaluate, name)
        scores[name] = found.score
        if found.margins is not None:
            margins[name] = found.margins
        if best is None or found.score > best.score:
            best, best_name = found, name
        step(partial(checkpoints.__getitem__, best_name))
    return Ranking(scores, best, margins)


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
