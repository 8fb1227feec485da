"""Paired differences of scores on the same test examples, with their 95 % intervals."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.special import stdtr, stdtrit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import check_scoring

from ..data.loaders import is_apart
from ..data.tokens import TEXT_TASKS
from ..recipes.base import BaseSoup
from ..recipes.validation import SCORER, is_log_likelihood, scorer_of, to_numpy
from ..runtime.fingerprint import fingerprint

N_RESAMPLES = 500  # gives a standard error to 3 %
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class PairedScore:
    """The score of a fitted soup on a test set, and how it varies with the examples.

    ``deviations`` are either one per example, what it adds to the score to first order (mean 0),
    or, if ``is_resampled``, the scores on resamples of the examples, the same for all soups.
    ``labels`` is a digest of the labels, in the order of the examples.
    """

    score: float
    n: int
    deviations: NDArray[np.float64] | None = None
    is_resampled: bool = False
    labels: str = ""

    def variance(self, deviations: NDArray[np.float64]) -> float:
        """Variance of a score, or of a difference of scores, from its deviations."""
        if len(deviations) < 2:
            return math.nan
        return float(deviations.var(ddof=1)) / (1 if self.is_resampled else self.n)


@dataclass(frozen=True)
class Difference:
    """A difference of two scores, its 95 % interval and p-value where they are known."""

    value: float | None
    interval: tuple[float, float] | None = None
    p_value: float | None = None


def paired_score(soup: BaseSoup, scoring: Any, X: Any, y: Any, with_error: bool) -> PairedScore:
    """Score a soup on a test set in one pass over its rows."""
    is_loss = scoring == "neg_log_loss" and is_log_likelihood(soup)
    if is_loss or (scoring is None and soup.task in TEXT_TASKS):
        return _log_likelihood(soup, X, y)
    known = scoring is None or isinstance(scoring, (str, SCORER))
    if not known or soup.task in TEXT_TASKS:  # a function may do anything with the soup
        n = len(y) if is_apart(y) else 0
        return PairedScore(float(scorer_of(soup, scoring)(soup, X, y)), n)
    outputs, labels = soup._outputs_and_targets(X, y, scoring is not None or is_apart(y))
    if labels is None:
        raise ValueError("score needs y, or batches that hold the targets.")
    labels, n = np.asarray(to_numpy(labels)), len(outputs)
    used = soup.outputs_.labeled(labels)
    digest = fingerprint(labels, used)
    seen = copy.copy(soup)  # rows are fed by number: their outputs are known
    seen.__dict__["_outputs_and_targets"] = lambda rows, y, ordered: (outputs[rows], y)
    scorer = scorer_of(seen, scoring)
    score = float(scorer(seen, np.arange(n), labels))
    if not with_error:
        return PairedScore(score, n)
    if scoring in (None, "accuracy") and soup.task != "regression":
        predicted = seen.predict(np.arange(n))
        right = (predicted == labels.reshape(predicted.shape)).reshape(n, -1)
        if soup.outputs_.leaves_out:
            counted = used.reshape(n, -1)
            found = _deviations((right & counted).sum(axis=1), counted.sum(axis=1))
        else:
            found = _deviations(right.all(axis=1), np.ones(n))
        return PairedScore(score, n, found, labels=digest)
    score_of: Callable[[NDArray[np.int64]], float] | None = None
    if soup.task == "classification":
        score_of = _score_of_counts(check_scoring(soup, scoring), seen, labels, used, score)
    if score_of is None:

        def score_of(rows: NDArray[np.int64]) -> float:
            return float(scorer(seen, rows, labels[rows]))

    return PairedScore(score, n, _resampled(score_of, n), is_resampled=True, labels=digest)


class _KnownLabels(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier of rows by number, whose labels are known and whose probabilities are not."""

    def __init__(self, predicted: NDArray[Any], classes: NDArray[Any]) -> None:
        self.predicted, self.classes_ = predicted, classes

    def predict(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        found: NDArray[Any] = self.predicted[rows]
        return found


def _score_of_counts(
    scorer: Callable[..., float],
    soup: BaseSoup,
    labels: NDArray[Any],
    used: NDArray[np.bool_],
    score: float,
) -> Callable[[NDArray[np.int64]], float] | None:
    """The score of resampled rows from how often each label was predicted for each label.

    A metric of predicted labels only needs these counts, as weights, which are far fewer than the
    rows, and than their pixels. None for other metrics, and for those without weights.
    """
    predicted = soup.predict(np.arange(len(labels)))
    used = used.reshape(predicted.shape)
    row = np.nonzero(used)[0]
    known, own = np.unique(predicted[used], return_inverse=True)
    true, theirs = np.unique(labels.reshape(predicted.shape)[used], return_inverse=True)
    pairs, column = np.unique(own * len(true) + theirs, return_inverse=True)
    counts = coo_array((np.ones(len(row)), (row, column)), (len(labels), len(pairs))).tocsr()
    found = _KnownLabels(known[pairs // len(true)], soup.classes_)
    true = true[pairs % len(true)]

    def score_of(rows: NDArray[np.int64]) -> float:
        weights = np.bincount(rows, minlength=len(labels)) @ counts
        present = np.flatnonzero(weights)
        return float(scorer(found, present, true[present], sample_weight=weights[present]))

    try:
        is_same = math.isclose(score_of(np.arange(len(labels))), score, rel_tol=1e-9, abs_tol=1e-12)
    except (AttributeError, TypeError, ValueError):
        return None
    return score_of if is_same else None


def _log_likelihood(soup: BaseSoup, X: Any, y: Any) -> PairedScore:
    """The mean log-likelihood of labels at several positions of a row, such as tokens."""
    labels: list[NDArray[Any]] = []  # of each minibatch, without those of padding
    lengths: list[NDArray[np.int64]] = []  # how many of each row
    seen = copy.copy(soup)

    def losses_of(logits: torch.Tensor, y: NDArray[Any]) -> Any:
        is_label = soup.outputs_.labeled(y)
        labels.append(y[is_label])
        lengths.append(is_label.reshape(len(y), -1).sum(axis=1))
        return soup._losses(logits, y)

    seen.__dict__["_losses"] = losses_of
    losses, counted = zip(*seen._row_losses(X, y, ordered=False), strict=True)
    total = sum(float(np.ones(len(part)) @ part) for part in losses)  # as in mean_log_likelihood
    amount = float(sum(part.sum() for part in counted))
    if not amount > 0:
        raise ValueError("score needs labels: y leaves out all of them.")
    sums, counts = np.concatenate(losses), np.concatenate(counted)
    digest = fingerprint(np.concatenate(labels), np.concatenate(lengths))
    return PairedScore(-total / amount, len(sums), _deviations(-sums, counts), labels=digest)


def _deviations(sums: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.float64]:
    """What each row adds, to first order, to a score that is sum(sums) / sum(counts)."""
    score = sums.sum() / counts.sum()
    found: NDArray[np.float64] = (sums - score * counts) / counts.mean()
    return found


def _resampled(
    score_of: Callable[[NDArray[np.int64]], float], n: int
) -> NDArray[np.float64] | None:
    """Scores on resamples of n rows; None where the metric is not defined on one of them."""
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metrics that are not defined on a resample
        try:
            found = np.array([score_of(rng.integers(n, size=n)) for _ in range(N_RESAMPLES)])
        except ValueError:
            return None
    return found if np.isfinite(found).all() else None


def differences(
    fits: Sequence[Mapping[str, PairedScore]], best: Mapping[str, PairedScore], shares_labels: bool
) -> dict[str, Any]:
    """The fields of a `SoupResult` that compare it with the best checkpoint."""
    _refuse_other_order(fits, best)
    first, *shifted = best
    own, under = paired_difference(fits, best, [first]), Difference(None)
    if shifted:
        under = paired_difference(fits, best, shifted, same_examples=shares_labels)
    return {
        "difference": own.value,
        "difference_interval": own.interval,
        "p_value": own.p_value,
        "shifted_difference": under.value,
        "shifted_difference_interval": under.interval,
    }


def _refuse_other_order(
    fits: Sequence[Mapping[str, PairedScore]], best: Mapping[str, PairedScore]
) -> None:
    """Raise an error if a test set gave its examples in another order each time."""
    for fit in fits:
        for name, reference in best.items():
            if fit[name].labels != reference.labels:
                raise ValueError(
                    f"The test set {name!r} can't be used to compare methods: its labels came in "
                    f"another order than for the best checkpoint, or the criterion leaves out "
                    f"some of them (ignore_index), so the examples can't be paired. Pass a "
                    f"DataLoader with shuffle=False, or arrays; use -100 for labels to ignore."
                )


def paired_difference(
    fits: Sequence[Mapping[str, PairedScore]],
    reference: Mapping[str, PairedScore],
    names: Sequence[str],
    same_examples: bool = True,
) -> Difference:
    """The mean difference from a reference over fits and test sets.

    The variance is that of the examples, of the differences averaged over the fits (and over test
    sets, if they hold the same examples), plus, with several fits, that of their mean. The interval
    is Student's, with the degrees of freedom of Welch and Satterthwaite.
    """
    each = [
        float(np.mean([fit[name].score - reference[name].score for name in names])) for fit in fits
    ]
    value = float(np.mean(each))
    parts = _of_examples(fits, reference, names, same_examples)
    if len(each) > 1:
        parts.append((float(np.var(each, ddof=1)) / len(each), len(each) - 1))
    variance = sum(part for part, _ in parts)
    if len(parts) == (len(each) > 1) or not math.isfinite(variance):
        return Difference(value)
    if variance == 0:  # the same predictions; or one difference everywhere, of too few examples
        return Difference(value, (0.0, 0.0), 1.0) if value == 0 else Difference(value)
    df = variance**2 / sum(part**2 / free for part, free in parts)
    error = math.sqrt(variance)
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * error
    p_value = float(2 * stdtr(df, -abs(value) / error))
    return Difference(value, (value - half, value + half), p_value)


def _of_examples(
    fits: Sequence[Mapping[str, PairedScore]],
    reference: Mapping[str, PairedScore],
    names: Sequence[str],
    same_examples: bool,
) -> list[tuple[float, int]]:
    """Variances that come from the test examples, and their degrees of freedom; [] if unknown."""
    changes = []
    for name in names:
        theirs = reference[name].deviations
        ours = [fit[name].deviations for fit in fits]
        if theirs is None or any(one is None for one in ours):
            return []
        changes.append(np.mean([one - theirs for one in ours if one is not None], axis=0))
    first = reference[names[0]]
    if same_examples and len({len(change) for change in changes}) == 1:
        return [(first.variance(np.mean(changes, axis=0)), max(first.n - 1, 1))]
    sets = [reference[name] for name in names]
    return [
        (one.variance(change) / len(names) ** 2, max(one.n - 1, 1))
        for one, change in zip(sets, changes, strict=True)
    ]
