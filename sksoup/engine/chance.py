"""Detect that no checkpoint is better than chance, which indicates wrong labels or targets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .scores import Evaluator

MIN_ROWS = {"classification": 30, "regression": 100}  # with fewer, nothing is certain
FEW = 30  # rows; with fewer, what is chosen is warned of
ERRORS = 2.0  # standard errors of a guess's accuracy
WIDEST = 0.1  # they are at most so much, or a weak network might be taken for a guess


def judge_scores(scores: Mapping[str, float], evaluate: Evaluator) -> str | None:
    """A warning if no score is better than chance on the rows of ``evaluate``, or None.

    ``scores`` were measured by ``evaluate``. Returns None for custom metrics and several labels per
    row. If there are too few rows to decide, the warning is about that.
    """
    outputs, n = evaluate.objective.outputs, _effective(evaluate.amounts, len(evaluate.y))
    if outputs.is_text:
        return _of_loss(scores, evaluate)
    if len(scores) > 1 and n < FEW and not outputs.is_dense:
        return (
            f"Only {n:.3g} held-out rows for selecting among {len(scores)} checkpoints, so the "
            f"selection is mostly due to chance: the standard error of the accuracy is up to "
            f"{0.5 / n**0.5:.2f}. Hold out {FEW} or more rows, or 50 or more for coefficients per "
            f"layer."
        )
    least = MIN_ROWS.get(outputs.task, math.inf)
    if not scores or evaluate.scorer is not None or n < least:
        return None
    name = max(scores, key=scores.__getitem__)
    best = scores[name]
    if outputs.task == "classification":
        return _of_accuracy(name, best, evaluate, n)
    if evaluate.rows is not None and best < 0:
        return (
            f"No checkpoint predicts these held-out rows better than the mean of y: the highest R² "
            f"is {best:.4f} ({name!r}), expected more than 0. The scale of y may differ from that "
            f"in training, for example if the targets were standardized. Transform y, or the "
            f"outputs with forward=."
        )
    return None


def _of_loss(scores: Mapping[str, float], evaluate: Evaluator) -> str | None:
    """Language models: what a guess among all tokens would lose, which no trained one does."""
    vocabulary = evaluate.objective.outputs.n_outputs
    if not scores or evaluate.scorer is not None:
        return None
    name = max(scores, key=scores.__getitem__)
    if scores[name] > -math.log(vocabulary):
        return None
    return (
        f"No checkpoint is better than chance on these held-out rows: the lowest loss is "
        f"{-scores[name]:.4f} ({name!r}), and guessing among {vocabulary} tokens has "
        f"{math.log(vocabulary):.4f}. The texts may be tokenized differently than in training, or "
        f"the labels may already be shifted; they are shifted internally, as in transformers."
    )


def _of_accuracy(name: str, best: float, evaluate: Evaluator, n: float) -> str | None:
    n_classes = evaluate.objective.outputs.n_outputs
    chance, share = 1 / n_classes, _largest_share(evaluate)

    def error(accuracy: float) -> float:
        return ERRORS * math.sqrt(accuracy * (1 - accuracy) / n)

    if best <= chance + error(chance) and error(chance) <= WIDEST:
        level = f"guessing among {n_classes} classes is correct for {chance:.4f}"
    elif best < share - error(share) and error(share) <= WIDEST:
        level = f"the most frequent class alone is {share:.4f}"
    else:
        return None
    return (
        f"No checkpoint is better than chance on these held-out rows: the highest accuracy is "
        f"{best:.4f} ({name!r}), and {level} of them. The order of the labels may differ from that "
        f"of the module's outputs: pass them in the order of the outputs, classes=[...]. Or X may "
        f"be preprocessed differently than in training."
    )


def _effective(weight: NDArray[np.float64] | None, n: int) -> float:
    """How many rows of equal weight have the standard error of these."""
    if weight is None:
        return float(n)
    square = float(np.square(weight).sum())
    return float(weight.sum()) ** 2 / square if square > 0 else 0.0


def _largest_share(evaluate: Evaluator) -> float:
    """Weighted share of the most frequent class among the labels that count."""
    y = np.asarray(evaluate.y).reshape(len(evaluate.y), -1)  # (N, positions)
    weight = np.ones(len(y)) if evaluate.weight is None else evaluate.weight
    weights = np.broadcast_to(weight[:, None], y.shape)
    used = ~evaluate.objective.outputs.left_out(y)
    y, weights = y[used], weights[used]
    _, where = np.unique(y.ravel(), return_inverse=True)
    counts = np.bincount(where.ravel(), weights=weights.ravel())
    return float(counts.max() / counts.sum()) if len(counts) and counts.sum() > 0 else 0.0
