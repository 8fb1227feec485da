"""Differences and intervals are those of plain formulas and of a plain bootstrap."""

from __future__ import annotations

import math
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score, log_loss, make_scorer, r2_score
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, MEHLSoup, UniformSoup
from sksoup.inspection import SoupComparison, SoupResult, compare_soups
from sksoup.inspection.paired import PairedScore, paired_difference, paired_score
from sksoup.inspection.units import Unit

from ..zoo import Net, Zoo, around

RECIPES = {"mean": UniformSoup(), "best": BestCheckpoint()}


@pytest.fixture
def rows(zoo: Zoo):
    """More examples than the zoo has, and labels with noise."""
    rng = np.random.default_rng(5)
    X = np.tile(zoo.X, (5, 1)) + rng.normal(size=(300, 4)).astype(np.float32)
    return X, np.tile(zoo.y, 5)


def compare(zoo: Zoo, X, y, recipes=RECIPES, checkpoints=None, val=None, **kwargs):
    val = (zoo.X, zoo.y) if val is None else val
    checkpoints = zoo.checkpoints if checkpoints is None else checkpoints
    return compare_soups(checkpoints, *val, X, y, recipes=recipes, measure_memory=False, **kwargs)


def assert_interval(result, differences, value=None):
    """Those of scipy's paired t-test."""
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    assert result.difference == pytest.approx(np.mean(differences) if value is None else value)
    assert result.difference_interval == pytest.approx((low, high))
    assert result.p_value == pytest.approx(test.pvalue)


def test_accuracy_is_a_paired_t_test(zoo: Zoo, rows):
    X, y = rows
    found = compare(zoo, X, y)
    right = {name: (soup.predict(X) == y).astype(float) for name, soup in found.soups.items()}
    mean, best = found.results
    assert_interval(mean, right["mean"] - right["best"])
    assert mean.difference != 0
    assert best.difference is best.difference_interval is best.p_value is None
    assert found.reference == "best"
    assert compare(zoo, X, y, scoring="accuracy").results[0].p_value == pytest.approx(mean.p_value)
    column = compare(zoo, X, y[:, None], val=(zoo.X, zoo.y)).results[0]
    assert column.p_value == mean.p_value
    half = mean.difference - mean.difference_interval[0]
    assert found.cells()[0][3] == f"{100 * mean.difference:+.2f} ± {100 * half:.2f}"
    assert found.cells()[1][3] == "-"
    frame = found.to_frame()
    assert frame.loc["mean", "difference_low"] == mean.difference_interval[0]
    assert math.isnan(frame.loc["best", "difference_high"])


def test_log_loss_is_a_paired_t_test(zoo: Zoo, rows):
    X, y = rows
    found = compare(zoo, X, y, scoring="neg_log_loss")
    logs = {
        name: np.log(soup.predict_proba(X)[np.arange(len(y)), y].astype(float))
        for name, soup in found.soups.items()
    }
    mean = found.results[0]
    assert mean.test == pytest.approx(-log_loss(y, found.soups["mean"].predict_proba(X)))
    test = stats.ttest_rel(logs["mean"], logs["best"])
    assert mean.difference_interval == pytest.approx(tuple(test.confidence_interval()), abs=1e-6)


def test_other_metrics_are_bootstrapped_with_pairs(zoo: Zoo, rows):
    X, y = rows
    found = compare(zoo, X, y, scoring=make_scorer(f1_score, average="macro"))
    predicted = {name: soup.predict(X) for name, soup in found.soups.items()}
    rng, differences = np.random.default_rng(1), []
    for _ in range(600):
        chosen = rng.integers(len(y), size=len(y))
        mean, best = (
            f1_score(y[chosen], predicted[name][chosen], average="macro") for name in RECIPES
        )
        differences.append(mean - best)
    result = found.results[0]
    low, high = result.difference_interval
    assert (high - low) / 2 == pytest.approx(1.97 * np.std(differences), rel=0.15)
    assert (low + high) / 2 == pytest.approx(result.difference)


def plain_f1(y_true, y_pred):
    """Without weights, so that it must be given all rows."""
    return f1_score(y_true, y_pred, average="macro")


@pytest.mark.parametrize("is_mask", [False, True])
def test_metrics_of_labels_are_bootstrapped_from_counts(is_mask):
    """The same scores, to the last bit, from a table of labels in place of 6,000 positions."""
    torch.manual_seed(0)
    nets = around(nn.Conv1d(2, 3, 1) if is_mask else nn.Linear(4, 3), 4, spread=0.5)
    X = torch.randn(200, 2, 30) if is_mask else torch.randn(6000, 4)
    y = (nets[0](X).argmax(dim=1) + (torch.rand(X[:, 0].shape if is_mask else 6000) < 0.2)) % 3
    if is_mask:
        y[:20, 3:] = -100
    soup = UniformSoup().fit(CheckpointCollection(nets, module=nets[0]), X[:100], y[:100])
    sizes: list[int] = []

    def counted_f1(y_true, y_pred, sample_weight=None):
        sizes.append(len(y_true))
        return f1_score(y_true, y_pred, average="macro", sample_weight=sample_weight)

    fast = paired_score(soup, make_scorer(counted_f1), X, y, with_error=True)
    slow = paired_score(soup, make_scorer(plain_f1), X, y, with_error=True)
    assert fast.is_resampled
    assert np.array_equal(fast.deviations, slow.deviations)
    assert len(np.unique(fast.deviations)) > 400
    assert len(sizes) == 502
    assert sum(sizes[1:]) <= 501 * 9


def test_regression_is_bootstrapped():
    torch.manual_seed(0)
    nets = around(nn.Linear(4, 1), 4, spread=0.3)
    X = torch.randn(200, 4)
    y = nets[0](X).detach()[:, 0] + torch.randn(200)
    ckpts = CheckpointCollection(nets, module=partial(nn.Linear, 4, 1))
    recipes = {"best": BestCheckpoint(task="regression"), "mean": UniformSoup(task="regression")}
    found = compare_soups(ckpts, X, y, X, y, recipes=recipes, measure_memory=False)
    result, targets = found.results[1], y.numpy()
    mean, best = (found.soups[name].predict(X) for name in ("mean", "best"))
    assert result.difference == pytest.approx(r2_score(targets, mean) - r2_score(targets, best))
    change = ((targets - best) ** 2 - (targets - mean) ** 2) / targets.var()  # at a fixed variance
    low, high = result.difference_interval
    assert (high - low) / 2 == pytest.approx(1.97 * change.std() / np.sqrt(200), rel=0.25)


def test_labels_of_pixels_count_by_row():
    torch.manual_seed(0)
    nets = around(nn.Conv1d(2, 3, 1), 4, spread=0.5)
    X = torch.randn(50, 2, 5)
    y = (nets[0](X).argmax(dim=1) + (torch.rand(50, 5) < 0.2)).remainder(3)
    y[:20, 3:] = -100
    ckpts = CheckpointCollection(nets, module=partial(nn.Conv1d, 2, 3, 1))
    found = compare_soups(ckpts, X, y, X, y, recipes=RECIPES, measure_memory=False)
    result, used = found.results[0], (y != -100).numpy()
    mean, best = (
        ((found.soups[name].predict(X) == y.numpy()) & used).sum(axis=1)
        for name in ("mean", "best")
    )
    counted = used.sum(axis=1)
    ratio = (mean - best).sum() / counted.sum()  # of two sums over rows
    z = ((mean - best) - ratio * counted) / counted.mean()
    half = stats.t.ppf(0.975, 49) * z.std(ddof=1) / np.sqrt(50)
    assert result.difference == pytest.approx(ratio)
    assert result.difference_interval == pytest.approx((ratio - half, ratio + half))


def test_tokens_count_by_text():
    torch.manual_seed(0)
    start = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    ids = torch.randint(5, (30, 6))
    ckpts = CheckpointCollection(around(start, 3, spread=0.5), module=start)
    recipes = {
        "best": BestCheckpoint(task="causal-lm"),
        "mean": UniformSoup(task="causal-lm", batch_size=8),
    }
    found = compare_soups(ckpts, ids, None, ids, None, recipes=recipes, measure_memory=False)
    result, losses = found.results[1], {}
    for name, soup in found.soups.items():
        logits = soup.module_(ids)[:, :-1].detach()
        each = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        losses[name] = each.mean(dim=1).double().numpy()  # texts are of one length
        assert found.results[name == "mean"].test == soup.score(ids)
    test = stats.ttest_rel(losses["best"], losses["mean"])
    assert result.difference == pytest.approx((losses["best"] - losses["mean"]).mean(), abs=1e-6)
    assert result.difference_interval == pytest.approx(tuple(test.confidence_interval()), abs=1e-6)
    assert " in perplexity on the 30 test examples" in found.verdict


def test_repeats_add_the_variance_of_the_seeds():
    rng = np.random.default_rng(0)
    psi, theirs = rng.normal(size=(3, 40)), rng.normal(size=40)
    scores = [0.5, 0.6, 0.8]
    fits = [{"a": PairedScore(s, 40, d)} for s, d in zip(scores, psi, strict=True)]
    found = paired_difference(fits, {"a": PairedScore(0.4, 40, theirs)}, ["a"])
    examples = (psi.mean(axis=0) - theirs).var(ddof=1) / 40
    seeds = np.var(scores, ddof=1) / 3
    df = (examples + seeds) ** 2 / (examples**2 / 39 + seeds**2 / 2)
    assert found.value == pytest.approx(np.mean(scores) - 0.4)
    half = stats.t.ppf(0.975, df) * np.sqrt(examples + seeds)
    assert found.interval == pytest.approx((found.value - half, found.value + half))
    t = found.value / np.sqrt(examples + seeds)
    assert found.p_value == pytest.approx(2 * stats.t.sf(t, df))


def test_several_sets_are_averaged_by_example_or_taken_as_independent(zoo: Zoo, rows):
    X, y = rows
    sets = {"clean": X, "noise": X + 0.5, "scaled": 0.5 * X}
    found = compare(zoo, sets, y)
    right = {
        name: np.mean(
            [(soup.predict(one) == y).astype(float) for one in list(sets.values())[1:]], axis=0
        )
        for name, soup in found.soups.items()
    }
    test = stats.ttest_rel(right["mean"], right["best"])
    mean = found.results[0]
    assert mean.shifted_difference == pytest.approx(np.mean(right["mean"] - right["best"]))
    assert mean.shifted_difference_interval == pytest.approx(tuple(test.confidence_interval()))
    assert "clean vs best" in found.header
    assert "shifted vs best" in found.header
    pairs = {"clean": (X, y), "few": (X[:100], y[:100]), "rest": (X[100:], y[100:])}
    apart = compare(zoo, pairs, None)
    d = {
        n: (apart.soups["mean"].predict(A) == b) * 1.0 - (apart.soups["best"].predict(A) == b)
        for n, (A, b) in pairs.items()
    }
    error = np.sqrt(sum(d[n].var(ddof=1) / len(d[n]) for n in ("few", "rest"))) / 2
    low, high = apart.results[0].shifted_difference_interval
    assert (high - low) / 2 == pytest.approx(1.975 * error, rel=0.01)
    named = compare(zoo, {"clean": X, "method": X, "worst": X, "seconds": X}, y)
    assert len(named.header) == len(named.cells()[0]) == 14  # whatever the sets are called


@pytest.mark.parametrize("scoring", [None, "f1_macro", "neg_log_loss"])
def test_intervals_cost_no_pass(zoo: Zoo, rows, scoring):
    X, y = rows
    fed = [0]

    def count(module, args, output):
        fed[0] += len(args[0]) if isinstance(module, Net) and len(args[0]) > 1 else 0

    handle = register_module_forward_hook(count)
    compare(zoo, X, y, scoring=scoring)
    handle.remove()
    assert fed[0] == 7 * 60 + 2 * (60 + 300)  # the ranking, and each of two on both sets


def test_what_has_no_difference(zoo: Zoo, rows):
    X, y = rows
    alone = compare(zoo, X, y, {"mean": UniformSoup(), "greedy": GreedySoup()})
    assert alone.reference is None
    assert alone.verdict == ""
    assert not any("best" in title for title in alone.header)
    no_test = compare(zoo, None, None)
    assert no_test.results[0].difference is None
    assert no_test.verdict == ""

    def anything(soup, X, y):
        return float((soup.predict(X) == y).mean())

    free = compare(zoo, X, y, scoring=anything)
    mean = free.results[0]
    assert mean.difference == pytest.approx(mean.test - free.results[1].test)
    assert mean.difference_interval is None
    assert "there is no interval for this metric" in free.verdict


def test_a_metric_that_is_undefined_on_a_resample_has_no_interval(zoo: Zoo):
    X, y = zoo.X[:6], zoo.y[:6]  # two of each label
    found = compare(zoo, X, y, scoring="roc_auc_ovr")
    assert found.results[0].difference is not None
    assert found.results[0].difference_interval is None


def test_equal_predictions_and_too_few_examples():
    flat = {"a": PairedScore(0.5, 10, np.zeros(10))}
    assert paired_difference([flat], flat, ["a"]).interval == (0.0, 0.0)
    other = {"a": PairedScore(0.6, 10, np.zeros(10))}
    assert paired_difference([other], flat, ["a"]).interval is None
    one = {"a": PairedScore(0.5, 1, np.zeros(1))}
    assert paired_difference([one], one, ["a"]).interval is None


def test_a_result_is_whole_when_it_is_told(zoo: Zoo, rows):
    seen = []
    found = compare(zoo, *rows, on_result=seen.append)
    assert [result.system for result in seen] == ["best", "mean"]  # the reference first
    assert [result.system for result in found.results] == ["mean", "best"]
    assert {*map(id, seen)} == {*map(id, found.results)}
    assert str(seen[0]) == (
        f"best: validation {seen[0].held_out:.4f}, test {seen[0].test:.4f}, {seen[0].seconds:.2f} s"
    )


def test_repeats_reach_the_table(zoo: Zoo, rows):
    soup = MEHLSoup(model_batch_size=2, max_epochs=1, batch_size=20, random_state=3, lr=0.5)
    found = compare(zoo, *rows, {"best": BestCheckpoint(), "mehl": soup}, n_repeats=2)
    mehl = found.results[1]
    assert mehl.difference == pytest.approx(mehl.test - found.results[0].test)
    low, high = mehl.difference_interval
    assert low < mehl.difference < high


# ------------------------------------------------------------------------------ verdict


def made(**differences: tuple[float, float, float]) -> SoupComparison:
    """A comparison with these differences, half widths and p-values."""
    best = SoupResult("Best", 0.8, 0.8, 1.0, 0.0, 0.0, None, 1)
    others = [
        SoupResult(name, 0.9, 0.8 + d, 1.0, 0.0, 0.0, None, 2, difference=d,
                   difference_interval=(d - half, d + half), p_value=p)
        for name, (d, half, p) in differences.items()
    ]  # fmt: skip
    return SoupComparison((best, *others), {}, 1000, {"test": 2000}, None, "Best")


def test_the_verdict_names_what_is_better():
    found = made(a=(0.0075, 0.0062, 0.001), b=(0.02, 0.005, 1e-9), c=(-0.03, 0.01, 1e-9))
    assert found.verdict == (
        "b is better than the best checkpoint by 2.00 ± 0.50 points on the 2,000 test examples "
        "(95 % interval), also after Bonferroni's correction for 3 comparisons; so is a. "
        "Significantly worse: c."
    )
    assert found.verdict in found.statement
    assert found.statement in str(found).replace("\n", " ")
    assert found.verdict_of("a") == (
        "a is better than the best checkpoint by 0.75 ± 0.62 points on the 2,000 test examples "
        "(95 % interval)."
    )
    assert found.verdict_of("c").startswith("c is worse than the best checkpoint by 3.00 ± 1.00")
    assert found.verdict_of("Best") == ""


def test_the_verdict_corrects_for_the_number_of_comparisons():
    found = made(a=(0.0075, 0.0062, 0.03), b=(0.001, 0.005, 0.7))
    assert found.verdict == (
        "No method is significantly better than the best checkpoint on the 2,000 test examples "
        "after Bonferroni's correction for 2 comparisons: the largest difference is +0.75 ± 0.62 "
        "points (a, 95 % interval)."
    )
    alone = made(a=(0.0075, 0.0062, 0.03))
    assert alone.verdict == alone.verdict_of("a")
    assert made(a=(0.001, 0.005, 0.7)).verdict == (
        "a does not differ significantly from the best checkpoint: the difference is +0.10 ± 0.50 "
        "points on the 2,000 test examples (95 % interval)."
    )
    many = made(**{f"m{k}": (0.02, 0.001, 1e-9) for k in range(6)})
    assert "; so are m1, m2, m3 and 2 more." in many.verdict


def test_perplexities_differ_downwards():
    found = made(a=(0.1, 0.02, 1e-9))
    with patch.object(SoupComparison, "_unit", lambda self, pm="±": Unit("perplexity", pm)):
        better = math.exp(-0.9)
        change = math.exp(-0.8) - better
        assert found.verdict_of("a").startswith(
            f"a is better than the best checkpoint by {change:.3f} ± {better * 0.02:.3f} in "
            f"perplexity on"
        )
        assert found.cells()[1][3] == f"-{change:.3f} ± {better * 0.02:.3f}"
