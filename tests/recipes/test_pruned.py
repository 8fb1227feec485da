"""Pruned soup: the authors' loop, written out, gives the same; and what its search costs."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from sksoup import CheckpointCollection, PrunedSoup, UniformSoup, mix
from sksoup.engine.parallel import evaluate_all
from sksoup.recipes.candidates import CandidateTrial
from sksoup.recipes.pruned import RemovalTrial

from ..zoo import Zoo, make_zoo


def pruned_by_authors(zoo: Zoo, min_improvement: float = 0.0) -> list[str]:
    """Dansereau et al.: start from the mean, take out the worst first, keep what is not worse."""
    module = zoo.checkpoints.build_module().eval()
    X = torch.as_tensor(zoo.X, dtype=next(module.parameters()).dtype)

    def score(state) -> float:
        module.load_state_dict(state)
        with torch.no_grad():
            return accuracy_score(zoo.y, module(X).argmax(dim=1))

    states = {name: zoo.checkpoints[name] for name in zoo.checkpoints}
    ranked = sorted(states, key=lambda name: -score(states[name]))
    n, soup = len(states), {}
    for tensor in states[ranked[0]]:
        soup[tensor] = sum(state[tensor] for state in states.values()) / n
    kept, baseline = list(states), score(soup)
    for name in reversed(ranked[1:]):
        without = {t: (soup[t] * n - states[name][t]) / (n - 1) for t in soup}
        if (found := score(without)) >= baseline + min_improvement:
            soup, n, baseline = without, n - 1, found
            kept.remove(name)
    return kept


@pytest.mark.parametrize("early_rejection", [False, True])
@pytest.mark.parametrize("min_improvement", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_authors_loop(seed, min_improvement, early_rejection):
    zoo = make_zoo(6, seed, dtype=torch.float64, batch_norm=False)
    soup = PrunedSoup(min_improvement=min_improvement, early_rejection=early_rejection)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert list(soup.ingredients_) == pruned_by_authors(zoo, min_improvement)
    mean = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.score(zoo.X, zoo.y) >= mean.score(zoo.X, zoo.y)
    assert soup.path_[0]["candidate"] is None
    assert soup.path_[0]["score"] == mean.score(zoo.X, zoo.y)
    dropped = {step["candidate"] for step in soup.path_ if step["dropped"]}
    assert dropped == set(zoo.checkpoints) - set(soup.ingredients_)
    assert soup.path_[0]["dropped"] is False


def test_some_zoo_loses_some_and_keeps_some():
    """What the loop is compared on decides something."""
    counts = {
        len(pruned_by_authors(make_zoo(6, seed, dtype=torch.float64, batch_norm=False)))
        for seed in range(6)
    }
    assert min(counts) < 6
    assert max(counts) > 1


def test_rows_are_spared_and_the_soup_is_the_same(zoo: Zoo):
    whole, spared = (
        PrunedSoup(early_rejection=early, batch_size=10).fit(zoo.checkpoints, zoo.X, zoo.y)
        for early in (False, True)
    )
    assert np.array_equal(whole.coef_, spared.coef_)
    assert whole.n_rows_evaluated_ == 60 * 7
    assert spared.n_rows_evaluated_ <= whole.n_rows_evaluated_
    for step in spared.path_:
        if step["is_bound"]:
            assert step["n_rows"] < 60
            assert not step["dropped"]


def test_a_run_that_spoils_the_mean_is_dropped():
    nets = CheckpointCollection(
        {name: {"weight": scale * torch.eye(2)} for name, scale in
         {"a": 1.0, "b": 2.0, "failed": -20.0, "c": 1.5}.items()},
        module=lambda: torch.nn.Linear(2, 2, bias=False),
    )  # fmt: skip
    X, y = torch.eye(2), torch.tensor([0, 1])
    soup = PrunedSoup().fit(nets, X, y)
    assert soup.path_[0]["score"] == 0.0
    assert soup.path_[1]["candidate"] == "failed"
    assert soup.path_[1]["dropped"]
    assert soup.path_[1]["gain"] == soup.score(X, y) == 1.0
    assert "failed" not in soup.ingredients_
    kept = PrunedSoup(min_improvement=0.5).fit(nets, X, y)
    assert kept.ingredients_ == ("a", "b", "c")


def test_a_file_is_read_five_times_at_most(zoo: Zoo, tmp_path):
    files = zoo.checkpoints.save(tmp_path)
    opened: dict[str, int] = dict.fromkeys(files, 0)
    plain = CheckpointCollection.open

    def count(self, name):
        opened[name] += 1
        return plain(self, name)

    with patch.object(CheckpointCollection, "open", count):
        soup = PrunedSoup().fit(files, zoo.X, zoo.y)
    assert max(opened.values()) <= 5
    assert len(soup.ingredients_) < 7


def test_a_fit_that_was_stopped_goes_on_with_the_same_bits(zoo: Zoo, tmp_path):
    once = PrunedSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    for n_done in range(1, 7):
        stopped = PrunedSoup(memory=tmp_path / str(n_done))
        calls = iter(range(n_done))

        def fail(self, candidate, evaluate, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return CandidateTrial._score(self, candidate, evaluate)

        with patch.object(RemovalTrial, "_score", fail), pytest.raises(KeyboardInterrupt):
            stopped.fit(zoo.checkpoints, zoo.X, zoo.y)
        stopped.fit(zoo.checkpoints, zoo.X, zoo.y)
        assert np.array_equal(stopped.coef_, once.coef_)
        assert [s["score"] for s in stopped.path_] == [s["score"] for s in once.path_]
        stopped.fit(zoo.checkpoints, zoo.X, zoo.y)
        assert stopped.counts_.n_forward == 0  # nothing is evaluated twice


def test_what_is_kept_is_of_what_was_dropped_before(zoo: Zoo):
    trials = []

    def record(trial, items, evaluate, n_workers):
        trials.append(trial)
        return evaluate_all(trial, items, evaluate, n_workers)

    with patch("sksoup.recipes.pruned.evaluate_all", record):
        PrunedSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    *_, last = trials
    assert replace(last, dropped=[1]).key(0) != replace(last, dropped=[2]).key(0)
    assert last.key(0) != last.key(1)


@pytest.mark.parametrize("batch_norm", ["average", "recalibrate", "auto"])
def test_statistics_of_batch_norm(zoo: Zoo, batch_norm):
    soup = PrunedSoup(batch_norm=batch_norm).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert bool(soup.recalibrated_) == (batch_norm == "recalibrate") or batch_norm == "auto"
    mixed = mix(zoo.checkpoints, soup.coef_)
    assert torch.equal(soup.state_dict()["head.weight"], mixed["head.weight"])


@pytest.mark.parametrize("batch_norm", ["average", "recalibrate", "auto"])
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_all_means_are_scored_with_the_statistics_of_the_soup(seed, n, batch_norm):
    """Those of a single checkpoint are its own; all others are re-estimated."""
    zoo = make_zoo(n, seed)
    soup = PrunedSoup(batch_norm=batch_norm).fit(zoo.checkpoints, zoo.X, zoo.y)
    uniform = UniformSoup(batch_norm=batch_norm).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.path_[0]["score"] == uniform.score(zoo.X, zoo.y)
    *_, last = (trial for trial in soup.path_ if trial["dropped"] or trial["candidate"] is None)
    assert last["score"] == soup.score(zoo.X, zoo.y)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_a_bad_improvement_is_refused(zoo: Zoo, value):
    with pytest.raises((ValueError, TypeError), match="min_improvement"):
        PrunedSoup(min_improvement=value).fit(zoo.checkpoints, zoo.X, zoo.y)


@pytest.mark.filterwarnings("ignore::sksoup.SoupWarning")  # of a run unlike the others
@pytest.mark.parametrize("large", [1e8, 1e30])
def test_a_run_that_diverged_is_dropped_in_half_precision(large):
    """Once its weights left the rounding of the sum in the place of the others' mean."""
    torch.manual_seed(0)
    base, X = torch.nn.Linear(16, 4), torch.randn(400, 16)
    y = base(X).argmax(dim=1)
    states = [
        {n: (w + 0.15 * torch.randn_like(w)).bfloat16() for n, w in base.state_dict().items()}
        for _ in range(5)
    ]
    bad = {n: (torch.randn_like(w) * large).bfloat16() for n, w in base.state_dict().items()}
    names = [*"abcde", "bad"]
    checkpoints = CheckpointCollection([*states, bad], names=names, module=lambda: base)
    soup = PrunedSoup().fit(checkpoints, X, y)
    mean = UniformSoup().fit(checkpoints.drop("bad"), X, y).score(X, y)
    first = next(step for step in soup.path_ if step["candidate"] == "bad")
    assert first["dropped"]
    assert first["score"] == pytest.approx(mean, abs=0.01)
    assert soup.score(X, y) >= mean - 0.01 > 0.6


def test_checkpoints_are_identified_a_constant_number_of_times(zoo: Zoo, tmp_path):
    counts = []
    for n in (4, 7):
        chosen = zoo.checkpoints.select(zoo.checkpoints.names[:n])
        with patch.object(
            CheckpointCollection,
            "identity",
            autospec=True,
            side_effect=CheckpointCollection.identity,
        ) as looks:
            PrunedSoup(memory=tmp_path / str(n)).fit(chosen, zoo.X, zoo.y)
        counts.append(looks.call_count / n)
    assert counts[0] == pytest.approx(counts[1], abs=0.5)
