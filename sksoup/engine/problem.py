"""Input and result of a search, and ranking, with which several searches start."""

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
    """The input of a search.

    Parameters
    ----------
    checkpoints : CheckpointCollection
        The checkpoints to mix.
    layers : Layers
        Assignment of tensors to rows of coefficients. The search finds ``layers.n_searched`` rows.
    data : HeldOut
        The held-out rows on the device, in minibatches: ``data.batches(batch_size)``.
    objective : Objective
        Loss, gradient and outputs with the current weights of the module.
    evaluate : Evaluator
        ``evaluate().score`` is the held-out score with the current weights of the module.
    progress : callable
        ``with progress("evaluation", n_steps) as step`` starts a task that is reported to
        callbacks; ``step()`` ends each of its steps.
    cache : Cache or None, default=None
        Stores results, so that an interrupted fit can resume. None without ``memory=``.
    doubt : str or None, default=None
        A warning if the module returns probabilities, not logits.
    """

    checkpoints: CheckpointCollection
    layers: Layers
    data: HeldOut
    objective: Objective
    evaluate: Evaluator
    progress: Callable[[str, int], AbstractContextManager[Step]]
    cache: Cache | None = None
    doubt: str | None = None

    @property
    def module(self) -> nn.Module:
        """A private module for trying weights (`load_weights`)."""
        return self.objective.module


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Parameters
    ----------
    coef : ndarray of shape (n_searched, n_checkpoints), float64
        Coefficients of the searched layers; each row sums to 1.
    history : list of dict
        Value of the attribute ``history_``.
    attributes : dict of str
        Further fitted attributes of the recipe, by name.
    rivals : dict of str to ndarray of shape (n_searched, n_checkpoints)
        Alternative coefficients by name. They are also mixed and scored on all held-out rows, and
        the best candidate becomes the soup.
    decided : (Evaluator, float) or None, default=None
        The evaluator with which the search selected the soup, and the score. The mix, which is
        rounded differently, is scored again, with a warning if its score is lower.
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
    """Score every checkpoint on the held-out rows, or use known scores.

    Cached scores are not evaluated again. The others are split between the ranks of a distributed
    job or between workers. Each has its own module and uses the same number of threads as this
    process, so the scores do not depend on the number of workers.

    Parameters
    ----------
    problem : Problem
        Problem with the checkpoints to score.
    step : callable
        Function from ``problem.progress``, called after each checkpoint.
    n_jobs : int or None, default=None
        Number of joblib workers.
    evaluate : Evaluator or None, default=None
        Evaluator for the scores. By default ``problem.evaluate``.

    Returns
    -------
    ranking : Ranking
        ``ranking.scores`` is a dict of str to float, in the order of the collection.
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
