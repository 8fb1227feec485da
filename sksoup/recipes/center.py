"""The center of a learned soup: a good point to search from, found by a cheap ranking, or given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_scalar

from ..data.split import split_rows
from ..engine.center import Anchor
from ..engine.problem import Found, Problem, Weights, rank_checkpoints
from ..engine.scores import Evaluator
from ..exceptions import DivergenceError
from ..mixing.mix import in_order
from ..runtime.distributed import all_gather
from .greedy import GreedySoup
from .validation import check_choice, no_progress

CENTERS = ("top", "best", "greedy", "mean")
TOP = 1 / 4  # fraction of the checkpoints, best first


@dataclass(frozen=True)
class Chosen:
    """The center of a search, and how the checkpoints ranked."""

    anchor: Anchor
    best: int | None = None  # the checkpoint that ranks first; None if none were ranked
    scores: dict[str, float] = field(default_factory=dict)  # measured for the ranking
    evaluate: Evaluator | None = None  # on the rows used for the ranking
    is_checked: bool = True  # whether the result is compared with the center

    @property
    def attributes(self) -> dict[str, Any]:
        """Fitted attributes that describe the center."""
        return {"center_": self.anchor.q}

    def coef(self, problem: Problem) -> NDArray[np.float64]:
        """(n_searched, K): the center's coefficients."""
        return np.tile(self.anchor.q, (problem.layers.n_searched, 1))

    def checked(self, found: Found, problem: Problem) -> Found:
        """Add the center and the best-ranked checkpoint, which the result is compared with."""
        if not self.is_checked:
            return found
        rivals = {"center": self.coef(problem)}
        if self.best is not None:
            best = np.zeros_like(found.coef)
            best[:, self.best] = 1
            if not np.array_equal(best, rivals["center"]):
                rivals["best"] = best
        return replace(found, rivals=rivals)


def check_center(soup: Any) -> None:
    """Check the parameters that determine where the search of a learned soup starts."""
    if isinstance(soup.center, str):
        check_choice(soup.center, "center", CENTERS)
    else:
        _given(soup.center)
    check_choice(soup.clip_deltas, "clip_deltas", ("median", None))
    if soup.ranking_rows is not None:
        check_scalar(soup.ranking_rows, "ranking_rows", Integral, min_val=1)


def _given(center: Any) -> NDArray[np.float64]:
    """The coefficients of a center given by the user."""
    try:
        q = np.asarray(center, dtype=np.float64)
    except (TypeError, ValueError):
        q = np.empty((0, 0))
    if q.ndim != 1 or not np.isfinite(q).all() or abs(q.sum() - 1) > 1e-6:
        raise ValueError(
            f"center must be one of {', '.join(map(repr, CENTERS))}, or one finite coefficient "
            f"per checkpoint that sum to 1, got {center!r}."
        )
    return q


def choose_center(soup: Any, problem: Problem, generator: torch.Generator) -> Chosen:
    """Choose the center of a soup's search, and warn if no checkpoint is better than chance.

    The generator draws the rows used for the ranking.
    """
    chosen = _choose(soup, problem, generator)
    if chosen.evaluate is not None:
        soup._warn_of_chance(chosen.scores, chosen.evaluate)
    return chosen


def _choose(soup: Any, problem: Problem, generator: torch.Generator) -> Chosen:
    checkpoints, center = problem.checkpoints, soup.center
    n, clips = len(checkpoints), soup.clip_deltas is not None
    known = checkpoints.scores
    if isinstance(center, str) and center == "mean":
        return Chosen(Anchor(np.ones(n), clips), is_checked=False)
    if not isinstance(center, str):
        q = _given(in_order(center, checkpoints.names))
        if len(q) != n:
            raise ValueError(
                f"center has {len(q)} coefficients, expected {n}: one per checkpoint, in the order "
                f"of the collection."
            )
        best = None if known is None else rank_checkpoints(problem, no_step).order[0]
        return Chosen(Anchor(q, clips), best)
    if center == "greedy":
        greedy = GreedySoup(
            task=soup.task, batch_norm=soup.batch_norm, batch_size=soup.batch_size
        ).find(replace(problem, progress=no_progress))
        scores = greedy.attributes["individual_scores_"]
        best = checkpoints.names.index(greedy.attributes["ingredients_"][0])
        evaluate = problem.evaluate if known is None else None
        return Chosen(Anchor((greedy.coef[0] > 0).astype(float), clips), best, scores, evaluate)
    checkpoints.check()  # also records which are unrelated to the others
    evaluate = None if known is not None else rows_to_rank(problem, soup.ranking_rows, generator)
    ranking = rank_checkpoints(problem, no_step, evaluate=evaluate)
    order = ranking.order
    strangers = checkpoints.strangers(checkpoints.names)
    # each rank has seen its own rows of them, but all must choose the same
    unrelated = set().union(*(all_gather(strangers) if checkpoints.rows else [strangers]))
    # a network with another starting point may rank high, but would ruin the mean
    related = [k for k in order if checkpoints.names[k] not in unrelated] or order
    weights = np.zeros(n)
    weights[related[: math.ceil(TOP * n)] if center == "top" else order[:1]] = 1
    return Chosen(Anchor(weights, clips), order[0], ranking.scores, evaluate)


def center_instead(
    soup: Any, chosen: Chosen, problem: Problem, error: DivergenceError, attributes: dict[str, Any]
) -> Found:
    """Use the center, with a warning, if the search diverged; raise if the center is the mean."""
    if not chosen.is_checked:
        raise error
    soup._warn(f"{error} The soup is the center from which the search started.")
    return Found(chosen.coef(problem), attributes=attributes)


def no_step(weights: Weights | None = None) -> None:
    """No-op progress callback: ranking is a small part of a fit."""


def rows_to_rank(problem: Problem, n_rows: int | None, generator: torch.Generator) -> Evaluator:
    """An evaluator on ``n_rows`` rows with weight, stratified by label, or on all if fewer."""
    evaluate = problem.evaluate
    amounts = evaluate.data.amounts
    counting = np.arange(len(evaluate.data))
    if amounts is not None:
        counting = counting[amounts.cpu().numpy() > 0]
    if n_rows is None or n_rows >= len(counting):
        return evaluate
    seed = int(torch.randint(2**31, (), generator=generator))
    fraction = (n_rows + 0.5) / len(counting)  # the half keeps rounding from dropping a row
    task = problem.objective.outputs.task
    drawn, _ = split_rows(evaluate.y[counting], task, None, fraction, seed)
    return evaluate.on(counting[drawn.numpy()])
