"""What a search is given and what it gives back; ranking, which several searches begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from ..runtime.distributed import agreed
from .objective import Objective, load_weights
from .parallel import evaluate_all
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
    rivals : dict of str to ndarray of shape (n_searched, n_checkpoints)
        Other coefficients, by what they are: they are mixed and scored on all held-out rows, too,
        and the best is the soup.
    decided : (Evaluator, float) or None, default=None
        The score that the search decided by, and what measures it: the mix, which is rounded in
        another way, is scored again, and a lower score is warned of.
    """

    coef: NDArray[np.float64]
    history: list[dict[str, Any]] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    rivals: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    decided: tuple[Evaluator, float] | None = None


@dataclass(frozen=True)
class Ranking:
    """Held-out score of every checkpoint, in collection order."""

    scores: dict[str, float]
    best: Evaluation | None  # of the first with the highest score; None where scores were known
    margins: dict[str, torch.Tensor] = field(default_factory=dict)  # (N,) each, where known

    @property
    def order(self) -> list[int]:
        """Places of the checkpoints in the collection, best first; equal scores stay in order."""
        scores = list(self.scores.values())
        return sorted(range(len(scores)), key=lambda k: -scores[k])


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
        known = checkpoints.scores
        return Ranking({name: known[name] for name in checkpoints.names}, None)
    scores: dict[str, float] = {}
    margins: dict[str, torch.Tensor] = {}
    best, best_name = None, ""
    trial, n_workers = CheckpointTrial(checkpoints), effective_n_jobs(n_jobs)
    for name, found in evaluate_all(trial, checkpoints.names, evaluate, n_workers):
        scores[name] = found.score
        if found.margins is not None:
            margins[name] = found.margins
        if best is None or found.score > best.score:  # the first on ties
            best, best_name = found, name
        step(partial(checkpoints.__getitem__, best_name))
    return Ranking(scores, best, margins)


@dataclass(frozen=True)
class CheckpointTrial:
    """Scores single checkpoints; the system reads the next into its cache meanwhile."""

    checkpoints: CheckpointCollection

    def __call__(self, name: str, evaluate: Evaluator) -> Evaluation:
        with agreed(evaluate.objective.is_sharded):
            load_weights(evaluate.objective.module, self.checkpoints[name])
        names = self.checkpoints.names
        for following in names[names.index(name) + 1 :][:1]:
            self.checkpoints.warm(following)
        return evaluate_named(evaluate, name)

    def key(self, name: str) -> tuple[Any, ...]:
        return "score", self.checkpoints.identity(name)

    def only(self, names: Sequence[str]) -> CheckpointTrial:
        return CheckpointTrial(self.checkpoints.select(names))
