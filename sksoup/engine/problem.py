"""What a search is given and what it gives back; ranking, which several searches begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from joblib import effective_n_jobs
from numpy.typing import NDArray
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.rows import HeldOut
from ..mixing.layers import Layers
from ..runtime.cache import Cache
from ..runtime.distributed import world_size
from .objective import Objective, load_weights
from .parallel import everywhere
from .scores import Evaluation, Evaluator, evaluate_named

# gives the weights of the soup as if the search stopped here; None: the module has them (now)
Weights: TypeAlias = Callable[[], Mapping[str, torch.Tensor] | None]


class Step(Protocol):
    """Report that a step is done to scikit-learn's callbacks; they may ask for the soup so far."""

    def __call__(self, weights: Weights | None = None) -> None: ...


@dataclass(frozen=True)
class Problem:
    """All a search may use.

    Parameters
    ----------
    checkpoints : CheckpointCollection
        What to mix.
    layers : Layers
        Which row of coefficients mixes which tensor; ``layers.n_searched`` rows are searched for.
    data : HeldOut
        The held-out rows on the device, in minibatches: ``data.batches(batch_size)``.
    objective : Objective
        Loss, gradient and outputs of the module's present weights.
    evaluate : Evaluator
        ``evaluate().score`` is the held-out score of the module's present weights.
    progress : callable
        ``with progress("evaluation", n_steps) as step`` begins a task that callbacks see;
        ``step()`` ends each of its steps.
    cache : Cache or None, default=None
        Keeps results for a fit that is stopped and started again; None without ``memory=``.
    """

    checkpoints: CheckpointCollection
    layers: Layers
    data: HeldOut
    objective: Objective
    evaluate: Evaluator
    progress: Callable[[str, int], AbstractContextManager[Step]]
    cache: Cache | None = None

    @property
    def module(self) -> nn.Module:
        """A private module to try weights in (`load_weights`)."""
        return self.objective.module


@dataclass(frozen=True)
class Found:
    """What a search found.

    Parameters
    ----------
    coef : ndarray of shape (n_searched, n_checkpoints), float64
        Coefficients of the searched layers; each row sums to 1.
    history : list of dict
        What ``history_`` will be.
    attributes : dict of str
        Fitted attributes of the recipe's own, by name.
    """

    coef: NDArray[np.float64]
    history: list[dict[str, Any]] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranking:
    """Held-out score of every checkpoint, in collection order."""

    scores: dict[str, float]
    best: Evaluation | None  # of the first with the highest score; None where scores were known
    margins: dict[str, torch.Tensor] = field(default_factory=dict)  # (N,) each, where known


def rank_checkpoints(
    problem: Problem,
    step: Step,
    *,
    n_jobs: int | None = None,
    evaluate: Evaluator | None = None,
) -> Ranking:
    """Score every checkpoint on the held-out rows; known scores are taken as given.

    What the cache has is not evaluated. Ranks of a distributed job share the others out, and so
    do workers; each has a module of its own and runs with this process's number of threads, so
    that the scores do not depend on how many there are.

    Parameters
    ----------
    problem : Problem
        Whose checkpoints are scored.
    step : callable
        Called after each, as ``problem.progress`` gives it.
    n_jobs : int or None, default=None
        Workers of joblib.
    evaluate : Evaluator or None, default=None
        What scores them; by default ``problem.evaluate``.

    Returns
    -------
    ranking : Ranking
        ``ranking.scores`` is a dict of str to float, in collection order.
    """
    checkpoints, evaluate = problem.checkpoints, evaluate or problem.evaluate
    if checkpoints.scores is not None:
        return Ranking(dict(checkpoints.scores), None)
    found: dict[str, Evaluation] = {}
    if evaluate.cache is not None:
        for name in checkpoints:
            kept = evaluate.cache.find("score", checkpoints.identity(name))
            found |= {} if kept is None else {name: Evaluation(**kept)}
    missing = [name for name in checkpoints.names if name not in found]
    n_workers = min(effective_n_jobs(n_jobs), len(missing))
    if missing and (world_size() > 1 or n_workers > 1):

        def job(names: Sequence[str]) -> Callable[[Evaluator], dict[str, Evaluation]]:
            return partial(evaluate_each, checkpoints.select(names))

        found |= everywhere(job, missing, evaluate, n_workers)
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


def evaluate_each(checkpoints: CheckpointCollection, evaluate: Evaluator) -> dict[str, Evaluation]:
    """Score checkpoints one after the other."""
    return {
        name: evaluate_one(checkpoints, evaluate, name, following)
        for name, following in with_following(checkpoints.names)
    }


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
    if evaluate.cache is not None:
        evaluate.cache.keep(vars(found), "score", checkpoints.identity(name), everywhere=True)
    return found
