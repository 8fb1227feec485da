from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import f1_score, make_scorer
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.data import DataLoader, TensorDataset

from sksoup import BestCheckpoint, GreedySoup, MEHLSoup, UniformSoup
from sksoup.inspection import (
    ComparisonDisplay,
    centered_systems,
    compare_soups,
    paper_systems,
)

from ..zoo import Net, Zoo


def test_compares_all_twelve_systems(zoo: Zoo, tmp_path):
    checkpoints = zoo.checkpoints.save(tmp_path / "zoo")
    seen = []
    comparison = compare_soups(
        checkpoints, zoo.X, zoo.y, zoo.X[:30], zoo.y[:30], on_result=seen.append
    )
    assert [r.system for r in comparison.results] == [*paper_systems(7), *centered_systems(7)]
    assert tuple(seen) == comparison.results
    for result in comparison.results:
        soup = comparison.soups[result.system]
        assert result.held_out == soup.score(zoo.X, zoo.y)
        assert result.test == soup.score(zoo.X[:30], zoo.y[:30])
        assert result.seconds > 0
    by_name = {r.system: r for r in comparison.results}
    assert by_name["Best checkpoint"].n_ingredients == 1
    assert by_name["Uniform-Soup"].forward_passes == 0
    assert 7 < by_name["Greedy-Soup"].forward_passes < 14  # chunks of 32 of 60 rows
    assert by_name["HL-Soup"].backward_passes == 5
    assert by_name["MEHL-Soup"].backward_passes == 20  # 4 model batches of 5 epochs
    assert by_name["Learned-Soup"].extra_memory > by_name["MEHL-Soup"].extra_memory + 3
    table = str(comparison).splitlines()
    assert len(set(map(len, table[2:14]))) == 1
    assert max(map(len, table)) <= 100
    below = " ".join(table[14:])
    assert "fitted on the 60 validation examples, so validation scores are optimistic." in below
    assert "Compare methods on the 30 test examples." in below
    assert comparison.to_markdown().count("\n") == 13


def test_checkpoints_are_ranked_once_and_everybody_pays(zoo: Zoo):
    recipes = {
        "best": BestCheckpoint(),
        "greedy": GreedySoup(early_rejection=False),
        "again": GreedySoup(early_rejection=False, min_improvement=0.5),
        "other metric": BestCheckpoint(scoring="neg_log_loss"),
        "split": GreedySoup(ranking_fraction=0.5, random_state=0, early_rejection=False),
    }
    rows = [0]

    def count(module, args, output):
        rows[0] += len(args[0]) if isinstance(module, Net) and len(args[0]) > 1 else 0

    handle = register_module_forward_hook(count)
    with patch("sksoup.inspection.comparison._extra_memory", lambda *args: 0.0):
        found = compare_soups(zoo.checkpoints, zoo.X, zoo.y, recipes=recipes)
    handle.remove()
    passes = {result.system: result.forward_passes for result in found.results}
    assert passes == {"best": 7, "greedy": 13, "again": 13, "other metric": 7, "split": 7}
    ranked = 60 * (7 + 7) + 30 * 7  # two metrics, and half of the rows
    tried = 60 * (6 + 6) + 30 * 7  # a soup that is split evaluates its best anew
    assert rows[0] == ranked + tried + 60 * len(recipes)  # and each is scored
    assert found.soups["best"].memory is None  # the one they shared ended with the comparison
    found.soups["greedy"].fit(zoo.checkpoints, zoo.X, zoo.y)


def test_repeats(zoo: Zoo):
    soup = MEHLSoup(model_batch_size=2, max_epochs=1, batch_size=20, random_state=3)
    recipes = {"mean": UniformSoup(), "mehl": soup}
    found = compare_soups(
        zoo.checkpoints, zoo.X, zoo.y, zoo.X[:40], zoo.y[:40], recipes=recipes, n_repeats=3
    )
    mean, mehl = found.results
    assert (mean.n_repeats, mehl.n_repeats) == (1, 3)
    assert mean.held_out_std == mean.test_std == 0
    fits = [
        clone(soup).set_params(random_state=seed).fit(zoo.checkpoints, zoo.X, zoo.y)
        for seed in (3, 4, 5)
    ]
    scores = [fit.score(zoo.X, zoo.y) for fit in fits]
    tests = [fit.score(zoo.X[:40], zoo.y[:40]) for fit in fits]
    assert mehl.held_out == pytest.approx(np.mean(scores))
    assert mehl.held_out_std == pytest.approx(np.std(scores, ddof=1))
    assert mehl.test_std == pytest.approx(np.std(tests, ddof=1))
    assert np.array_equal(found.soups["mehl"].coef_, fits[0].coef_)
    assert f"± {100 * mehl.held_out_std:.2f}" in str(found)
    bars = ComparisonDisplay.from_comparison(found)
    assert bars.test_std.tolist() == [0.0, mehl.test_std]
    with pytest.raises(ValueError, match="n_repeats must be an int >= 1, got 0"):
        compare_soups(zoo.checkpoints, zoo.X, zoo.y, n_repeats=0)


def test_examples_of_loaders_are_counted_and_not_their_minibatches(zoo: Zoo):
    n = len(zoo.y)
    loader = DataLoader(TensorDataset(torch.as_tensor(zoo.X), torch.as_tensor(zoo.y)), 7)
    recipes = {"best": BestCheckpoint()}
    arrays = compare_soups(zoo.checkpoints, zoo.X, zoo.y, zoo.X, zoo.y, recipes=recipes)
    found = compare_soups(zoo.checkpoints, loader, None, loader, None, recipes=recipes)
    data_set = compare_soups(zoo.checkpoints, loader.dataset, None, recipes=recipes)
    assert data_set.results[0].extra_memory < 1.5 * arrays.results[0].extra_memory  # without rows
    assert found.n_held_out == n
    assert found.n_test == {"test": n}
    assert found.results[0].forward_passes == arrays.results[0].forward_passes


def test_any_systems_and_no_test_rows(zoo: Zoo):
    comparison = compare_soups(
        zoo.checkpoints, zoo.X, zoo.y, recipes={"a": UniformSoup(), "b": GreedySoup()}
    )
    assert [r.system for r in comparison.results] == ["a", "b"]
    assert comparison.results[0].test is None
    assert "test %" not in comparison.header  # no empty columns
    assert "No test data was given." in comparison.statement


def test_memory_does_not_depend_on_where_the_checkpoints_live(zoo: Zoo, tmp_path):
    systems = {"mehl": MEHLSoup(model_batch_size=2, random_state=0)}
    files = zoo.checkpoints.save(tmp_path / "zoo")
    memory, disk = (
        compare_soups(c, zoo.X, zoo.y, recipes=systems).results[0].extra_memory
        for c in (zoo.checkpoints, files)
    )
    assert memory == pytest.approx(disk, abs=2)  # tiny nets: a few hundred bytes are a model


def test_memory_leaves_out_the_rows_however_they_are_given(zoo: Zoo):
    systems = {"mehl": MEHLSoup(model_batch_size=2, random_state=0)}
    array, named = (
        compare_soups(zoo.checkpoints, X, zoo.y, recipes=systems).results[0].extra_memory
        for X in (zoo.X, {"x": zoo.X})
    )
    assert named == pytest.approx(array, abs=0.5)


@pytest.mark.parametrize("scoring", ["f1_macro", make_scorer(f1_score, average="macro")])
def test_any_metric_is_reported(zoo: Zoo, scoring):
    recipes = {"best": BestCheckpoint(), "mean": UniformSoup()}
    found = compare_soups(
        zoo.checkpoints, zoo.X, zoo.y, zoo.X[:30], zoo.y[:30], recipes=recipes, scoring=scoring
    )
    result, soup = found.results[1], found.soups["mean"]
    expected = f1_score(zoo.y[:30], soup.predict(zoo.X[:30]), average="macro")
    assert result.test == pytest.approx(expected)
    assert result.test != soup.score(zoo.X[:30], zoo.y[:30])
    said = str(found)
    assert " %" not in said.split("vs best:")[0]
    assert f"{expected:.4f}" in said
    assert "Scores are " + ("f1_macro." if scoring == "f1_macro" else "make_scorer(f1_") in said
    assert found.header[1:4] == ("validation", "test", "vs best")


def test_a_split_ranking_is_drawn_anew_by_every_repeat(zoo: Zoo):
    recipes = {"split": GreedySoup(ranking_fraction=0.5, random_state=0), "whole": GreedySoup()}
    found = compare_soups(zoo.checkpoints, zoo.X, zoo.y, recipes=recipes, n_repeats=2)
    assert [result.n_repeats for result in found.results] == [2, 1]


def test_bad_arguments(zoo: Zoo):
    with pytest.raises(TypeError, match=r"recipes is a list, expected a mapping of names"):
        compare_soups(zoo.checkpoints, zoo.X, zoo.y, recipes=[UniformSoup()])
    with pytest.raises(TypeError, match="expected a CheckpointCollection"):
        compare_soups([], zoo.X, zoo.y)
    with pytest.raises(ValueError, match="both X_test and y_test"):
        compare_soups(zoo.checkpoints, zoo.X, zoo.y, zoo.X)
    with pytest.raises(TypeError, match="measure_memory must be True or False, got 'no'"):
        compare_soups(zoo.checkpoints, zoo.X, zoo.y, measure_memory="no")


@pytest.mark.parametrize("scoring", [None, "accuracy", "f1_macro", "neg_log_loss"])
def test_labels_of_a_loader_may_be_in_its_batches(zoo: Zoo, scoring):
    X, y = torch.as_tensor(zoo.X), torch.as_tensor(zoo.y)
    loader = DataLoader(TensorDataset(X, y), batch_size=7)
    recipes = {"uniform": UniformSoup(), "best": BestCheckpoint()}
    (a, b), (c, d) = (
        compare_soups(zoo.checkpoints, *rows, recipes=recipes, scoring=scoring).results
        for rows in ((loader, None, loader, None), (zoo.X, zoo.y, zoo.X, zoo.y))
    )
    for one, other in ((a, c), (b, d)):
        assert one.held_out == pytest.approx(other.held_out, abs=1e-6)
        assert one.test == pytest.approx(other.test, abs=1e-6)
