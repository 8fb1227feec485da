"""Comparison of soups on the same checkpoints, validation data and test data."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

from ..checkpoints.collection import CheckpointCollection
from ..data.arrays import n_rows, parts_of
from ..data.loaders import walk
from ..data.outputs import Task
from ..data.rows import is_loader
from ..exceptions import SoupWarning
from ..recipes.base import BaseSoup
from ..recipes.baselines import BestCheckpoint, CheckpointEnsemble, UniformSoup
from ..recipes.greedy import GreedySoup
from ..recipes.learned import LearnedSoup
from ..recipes.mehl import MEHLSoup
from ..recipes.validation import check_flag
from ..runtime.live_tensors import LiveTensors
from .paired import PairedScore, differences, paired_score
from .results import SoupComparison, SoupResult
from .test_sets import Rows, named_test_sets

# the papers' own settings, where the recipes have other defaults
LEARNED: dict[str, Any] = {"center": "mean", "clip_deltas": None}
MEHL: dict[str, Any] = {**LEARNED, "weight_decay": 0.0, "max_epochs": 5, "lr": 0.05}


def paper_systems(
    n_checkpoints: int, *, task: Task = "classification", random_state: Any = 0
) -> dict[str, BaseSoup]:
    """Make the ten systems of the two papers, with the papers' settings, unfitted.

    MEHL-Soup takes a quarter of the checkpoints at a time; with all of them it would be HL-Soup.

    Parameters
    ----------
    n_checkpoints : int
        K, for the model batch ``ceil(K / 4)``.
    task : str, default="classification"
        What the outputs mean: "classification", "regression", "multilabel", or "language-modeling"
        (docs: Language models).
    random_state : int or None, default=0
        Seed of the systems that draw at random.

    Returns
    -------
    systems : dict of str to estimator
        In the order of the papers' tables.

    See Also
    --------
    centered_systems : `MEHLSoup` with its defaults, rows eleven and twelve.

    References
    ----------
    Wortsman et al., arXiv:2203.05482; Li et al., arXiv:2407.03641, Table 1.

    Examples
    --------
    >>> from sksoup.inspection import paper_systems
    >>> len(paper_systems(24)), paper_systems(24)["MEHL-Soup"].model_batch_size
    (10, 6)
    """
    b = -(-n_checkpoints // 4)
    seed = {"task": task, "random_state": random_state}
    learned, mehl = {**LEARNED, **seed}, {**MEHL, **seed}
    return {
        "Best checkpoint": BestCheckpoint(task=task),
        "Uniform-Soup": UniformSoup(task=task),
        "Greedy-Soup": GreedySoup(task=task),
        "Learned-Soup": LearnedSoup(**learned),
        "Learned-Soup+": LearnedSoup(layerwise=True, **learned),
        "HL-Soup": MEHLSoup(model_batch_size=None, **mehl),
        "HL-Soup+": MEHLSoup(model_batch_size=None, layerwise=True, **mehl),
        "MEHL-Soup": MEHLSoup(model_batch_size=b, **mehl),
        "MEHL-Soup+": MEHLSoup(model_batch_size=b, layerwise=True, **mehl),
        "Ensemble": CheckpointEnsemble(task=task),
    }


def centered_systems(
    n_checkpoints: int, *, task: Task = "classification", random_state: Any = 0
) -> dict[str, BaseSoup]:
    """Make the two systems that `MEHLSoup` is with its defaults, unfitted.

    Where the papers' systems start from the mean of all checkpoints, these have a center that one
    failed checkpoint can't move. Centered-Soup has one coefficient per checkpoint, Centered-Soup+
    one per checkpoint and layer.

    Parameters
    ----------
    n_checkpoints : int
        K; the defaults do not depend on it, it is here so that the call is that of `paper_systems`.
    task : str, default="classification"
        What the outputs mean: "classification", "regression", "multilabel", or "language-modeling"
        (docs: Language models).
    random_state : int or None, default=0
        Seed of the order of rows.

    Returns
    -------
    systems : dict of str to estimator
        "Centered-Soup" and "Centered-Soup+".

    See Also
    --------
    paper_systems : The ten systems of the papers.

    Examples
    --------
    >>> from sksoup.inspection import centered_systems
    >>> list(centered_systems(24))
    ['Centered-Soup', 'Centered-Soup+']
    """
    return {
        "Centered-Soup": MEHLSoup(task=task, random_state=random_state),
        "Centered-Soup+": MEHLSoup(layerwise=True, task=task, random_state=random_state),
    }


def compare_soups(
    checkpoints: CheckpointCollection,
    X_val: Any,
    y_val: Any,
    X_test: Any = None,
    y_test: Any = None,
    *,
    recipes: Mapping[str, BaseSoup] | None = None,
    scoring: str | Callable[..., float] | None = None,
    n_repeats: int = 1,
    measure_memory: bool = True,
    on_result: Callable[[SoupResult], None] | None = None,
) -> SoupComparison:
    """Fit several methods on the same checkpoints and validation data, and measure them.

    Where one of them is `BestCheckpoint`, each of the others is compared with it: the difference of
    their test scores is given with its 95 % confidence interval, paired by test example.

    Parameters
    ----------
    checkpoints : CheckpointCollection
        The checkpoints to mix.
    X_val, y_val : array-like or Tensor of n_samples rows
        Validation data, on which the coefficients are found; ``y_val`` may be None for language
        models, as in `fit`.
    X_test : array-like, Tensor or mapping of str to test sets, or None, default=None
        Test data, which is used for scores only. Several test sets, such as
        ``{"clean": X, "noise": X_noisy}``, by name: the first is the reference, the others are
        called shifted. Each is inputs whose labels are ``y_test``, or a pair ``(X, y)``. A mapping
        with the keys of ``X_val`` is one test set of several inputs.
    y_test : array-like or Tensor, or None, default=None
        Their labels; None where the test sets are pairs.
    recipes : mapping of str to estimator or None, default=None
        Unfitted soups by name; they are cloned. The first `BestCheckpoint` among them is what the
        others are compared with, and is measured first; without one there are no differences. By
        default the ten of `paper_systems` and the two of `centered_systems` for classification; for
        another task give ``recipes=paper_systems(K, task=...)``.
    scoring : str, callable or None, default=None
        Metric of the results, as in scikit-learn; by default accuracy or R². It does not change
        the searches: `GreedySoup` has a ``scoring`` of its own, and the learned ones use a loss.
    n_repeats : int, default=1
        Fits of each recipe that draws at random, with the seeds ``random_state``,
        ``random_state + 1``, ... (from 0 where it has no number).
    measure_memory : bool, default=True
        Whether to count memory, in a second fit of each recipe.
    on_result : callable or None, default=None
        Called with each `SoupResult` as soon as it is measured.

    Returns
    -------
    comparison : SoupComparison
        Results and fitted methods.

    Raises
    ------
    TypeError
        ``checkpoints`` is not a collection, ``recipes`` is not a mapping, or ``measure_memory`` is
        neither True nor False.
    ValueError
        Only one of ``X_test`` and ``y_test`` is given, or a test set has another number of labels
        than of rows, or its rows come in another order each time; ``n_repeats`` is less than 1; or
        as `fit`.

    Notes
    -----
    *Differences.* All methods are tested on the same examples, so that most of the noise of their
    scores is shared and cancels in the difference. For accuracy and log-loss (also of pixels and
    tokens) the interval is the one of a paired t-test: the mean of the differences of the examples,
    plus and minus Student's quantile times their standard error. For any other metric of
    scikit-learn, R² and ``"f1_macro"`` among them, the standard error is that of a paired bootstrap
    of 500 resamples of the test examples. A scoring function that is not made by ``make_scorer``
    can't be resampled, as it may do anything with the soup: the difference has no interval then,
    nor has one of a metric that is undefined on a resample. The interval relies on the central
    limit theorem: it takes some tens of test examples on which the two methods differ.

    With ``n_repeats`` the difference is the mean over the fits. Its variance is the sum of that of
    the test examples, whose differences are averaged over the fits, and of that of the mean over
    the seeds (Welch and Satterthwaite's degrees of freedom), so that the interval is one for the
    method, not for a single fit.

    With several test sets there are two differences: on the first, and of the mean score on the
    shifted ones. Sets that share ``y_test`` are taken for the same examples in other forms and
    averaged example by example; sets that are pairs are taken for independent samples.

    Intervals and p-values are for one comparison each. ``SoupComparison.verdict`` corrects for the
    number of comparisons.

    *Cost.* Each fit predicts the validation and the test data once. Checkpoints are ranked once for
    all recipes that rank them on all rows in the same way; the time and passes of the ranking are
    added to each of them, so that seconds can be compared. A recipe that ranks on some of the rows
    does so itself. Memory is counted in a second fit, so that counting does not slow the first; a
    recipe that uses gradient descent runs one inner epoch in it.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, UniformSoup
    >>> from sksoup.inspection import compare_soups
    >>> nets = CheckpointCollection([torch.nn.Linear(2, 2) for _ in range(3)])
    >>> X, y = torch.eye(2), torch.tensor([0, 1])
    >>> comparison = compare_soups(nets, X, y, recipes={"mean": UniformSoup()})
    >>> [result.system for result in comparison.results]
    ['mean']
    """
    if not isinstance(checkpoints, CheckpointCollection):
        raise TypeError(
            f"checkpoints is a {type(checkpoints).__name__}, expected a CheckpointCollection: "
            f"CheckpointCollection.from_path(folder, module=build_model)."
        )
    if recipes is not None and not isinstance(recipes, Mapping):
        raise TypeError(
            f"recipes is a {type(recipes).__name__}, expected a mapping of names to unfitted "
            f"soups: {{'greedy': GreedySoup()}}."
        )
    if not isinstance(n_repeats, Integral) or n_repeats < 1:
        raise ValueError(f"n_repeats must be an int >= 1, got {n_repeats!r}.")
    check_flag(measure_memory, "measure_memory")
    tests = named_test_sets(X_val, y_val, X_test, y_test)
    shares_labels = y_test is not None
    given = recipes or {**paper_systems(len(checkpoints)), **centered_systems(len(checkpoints))}
    reference = next((n for n, soup in given.items() if isinstance(soup, BestCheckpoint)), None)
    n_val = _n_rows(X_val, y_val)
    data = sum(int(part.nbytes) for part in _parts(X_val, y_val)) if measure_memory else 0
    results: dict[str, SoupResult] = {}
    soups: dict[str, BaseSoup] = {}
    best: dict[str, PairedScore] | None = None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as memory:
        rankings: dict[str, tuple[float, int]] = {}
        for name in sorted(given, key=lambda name: name != reference):
            recipe = given[name]
            ranked, cost = _ranked(recipe, checkpoints, X_val, y_val, memory, rankings)
            fits = _fits(ranked, n_repeats, checkpoints, (X_val, y_val), tests, scoring, reference)
            soups[name] = fits[0].soup
            result = _summary(name, fits, cost, n_val)
            if name == reference:
                best = fits[0].tests
            elif best:
                result = replace(
                    result, **differences([fit.tests for fit in fits], best, shares_labels)
                )
            if measure_memory:
                memory_used = _extra_memory(ranked, checkpoints, X_val, y_val, data)
                result = replace(result, extra_memory=memory_used)
            if "memory" in (params := recipe.get_params(deep=False)):
                soups[name].set_params(memory=params["memory"])  # the shared one is temporary
            results[name] = result
            if on_result is not None:
                on_result(result)
    n_test = {name: _n_rows(*rows) for name, rows in tests.items()}
    metric = None if scoring is None else getattr(scoring, "__name__", str(scoring))
    return SoupComparison(
        tuple(results[name] for name in given),
        {name: soups[name] for name in given},
        n_val,
        n_test,
        metric,
        reference if tests else None,
    )


def _n_rows(X: Any, y: Any) -> int:
    """How many examples; those of a loader are counted in a pass over it."""
    if is_loader(X):
        batches = walk(X, y, ordered=False, n_inputs=None)
        return sum(n_rows(rows) for rows, _ in batches)
    return n_rows(X) if y is None else len(y)


def _ranked(
    recipe: BaseSoup,
    checkpoints: CheckpointCollection,
    X: Any,
    y: Any,
    memory: str,
    rankings: dict[str, tuple[float, int]],
) -> tuple[BaseSoup, tuple[float, int]]:
    """The recipe with a memory that holds the ranking, and the seconds and rows of the ranking."""
    params = recipe.get_params(deep=False)
    ranks = isinstance(recipe, (BestCheckpoint, GreedySoup))
    if not ranks or params["memory"] is not None or params.get("ranking_fraction") is not None:
        return clone(recipe), (0.0, 0)  # no ranking on all rows, or a memory of its own
    names = BestCheckpoint().get_params(deep=False)
    shared = {name: params[name] for name in names if name not in ("checkpoints", "memory")}
    if (key := repr(shared)) not in rankings:
        begin = time.perf_counter()
        best = BestCheckpoint(memory=memory, **shared).fit(checkpoints, X, y)
        rankings[key] = (time.perf_counter() - begin, best.counts_.rows_forward)
    return clone(recipe).set_params(memory=memory), rankings[key]


@dataclass(frozen=True)
class _Fit:
    """One fit of a recipe, its time, and its scores."""

    soup: BaseSoup
    seconds: float
    held_out: float
    tests: dict[str, PairedScore]


def _fits(
    recipe: BaseSoup,
    n_repeats: int,
    checkpoints: CheckpointCollection,
    val: Rows,
    tests: Mapping[str, Rows],
    scoring: Any,
    reference: str | None,
) -> list[_Fit]:
    """Fit a recipe ``n_repeats`` times, once where it draws nothing at random."""
    params = recipe.get_params(deep=False)
    ranks_all = isinstance(recipe, GreedySoup) and recipe.ranking_fraction is None
    if "random_state" not in params or ranks_all:  # nothing is drawn
        n_repeats = 1
    seed = params.get("random_state")
    fits = []
    for repeat in range(n_repeats):
        soup = clone(recipe)
        if n_repeats > 1:
            soup.set_params(random_state=(int(seed) if isinstance(seed, Integral) else 0) + repeat)
        begin = time.perf_counter()
        soup.fit(checkpoints, *val)
        seconds = time.perf_counter() - begin
        held_out = paired_score(soup, scoring, *val, with_error=False).score
        with_error = reference is not None
        found = {
            name: paired_score(soup, scoring, *rows, with_error) for name, rows in tests.items()
        }
        fits.append(_Fit(soup, seconds, held_out, found))
    return fits


def _summary(name: str, fits: list[_Fit], ranking: tuple[float, int], n: int) -> SoupResult:
    """The mean result of the fits of a recipe; ``ranking`` is seconds and rows, n those of val."""
    spread = statistics.stdev if len(fits) > 1 else lambda scores: 0.0
    first, held_outs = fits[0].soup, [fit.held_out for fit in fits]
    by_test = {test: [fit.tests[test].score for fit in fits] for test in fits[0].tests}
    means = {test: statistics.mean(scores) for test, scores in by_test.items()}
    spreads = {test: spread(scores) for test, scores in by_test.items()}
    return SoupResult(
        system=name,
        held_out=statistics.mean(held_outs),
        test=next(iter(means.values()), None),
        seconds=statistics.mean(fit.seconds for fit in fits) + ranking[0],
        forward_passes=(first.counts_.rows_forward + ranking[1]) / n,
        backward_passes=first.counts_.rows_backward / n,
        extra_memory=None,
        n_ingredients=int(np.count_nonzero(np.atleast_2d(first.coef_).any(axis=0))),
        held_out_std=spread(held_outs),
        test_std=next(iter(spreads.values()), 0.0),
        n_repeats=len(fits),
        tests=means,
        tests_std=spreads,
    )


def _parts(X: Any, y: Any) -> Iterator[Any]:
    """The arrays and tensors in the data; those of a loader one minibatch after the other."""
    if is_loader(X):
        for rows, labels in walk(X, y, ordered=False, n_inputs=None):
            yield from (*parts_of(rows), *([] if labels is None else [labels]))
    else:
        for part in (*parts_of(X), *([] if y is None else [y])):
            yield part if isinstance(part, torch.Tensor) else np.asarray(part)


def _extra_memory(
    system: BaseSoup, checkpoints: CheckpointCollection, X: Any, y: Any, data: int
) -> float:
    """Peak of live tensors in a short fit, without the module and the data, in model sizes."""
    params, short = system.get_params(deep=False), {"memory": None, "max_epochs": 1}
    soup = clone(system).set_params(**{name: short[name] for name in short if name in params})
    with LiveTensors(ignored=checkpoints.held_tensors()) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)  # the first fit has given them
        soup.fit(checkpoints, X, y)
    module = sum(p.nbytes for p in checkpoints.build_module().parameters())
    return max(0.0, (live.peak - data - module) / checkpoints.nbytes)
