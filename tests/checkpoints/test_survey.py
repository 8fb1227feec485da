"""Bad checkpoints among good ones: exactly those are named, however bad they are."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sksoup import CheckpointCollection, CheckpointError, SoupWarning
from sksoup.checkpoints.survey import judge
from sksoup.datasets import make_digits_checkpoints

SHAPES = {"a": (12, 20), "b": (20,), "c": (8, 12), "norm": (12,)}


def good_states(n, seed, spread=0.01):
    """A start, and small deltas of lengths that differ by a factor of about 3."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape):
        return torch.randn(shape, generator=generator)

    start = {name: 0.3 * noise(shape) for name, shape in SHAPES.items()}
    start["norm"] = torch.ones(12)
    lengths = spread * torch.exp(torch.rand(n, generator=generator))
    return [{t: w + 0.3 * s * noise(w.shape) for t, w in start.items()} for s in lengths]


def noise_of(times):
    def spoil(state, generator):
        return {
            t: w + times * w.square().mean().sqrt() * torch.randn(w.shape, generator=generator)
            for t, w in state.items()
        }

    return spoil


def with_a_number(tensor, value):
    def spoil(state, generator):
        changed = state[tensor].clone()
        changed.view(-1)[len(changed) // 2] = value
        return {**state, tensor: changed}

    return spoil


FAILURES = {
    **{f"noise of {times}": noise_of(times) for times in (0.5, 1, 5, 20)},
    "times 30": lambda state, generator: {t: 30 * w for t, w in state.items()},
    "times 1e30": lambda state, generator: {t: 1e30 * w for t, w in state.items()},
    "zeros": lambda state, generator: {t: 0 * w for t, w in state.items()},
    "another start": lambda state, generator: {
        t: 0.3 * torch.randn(w.shape, generator=generator) for t, w in state.items()
    },
    "a huge bias": with_a_number("b", 1e20),
    "NaN": with_a_number("a", torch.nan),
    "NaN in a bias": with_a_number("b", torch.nan),
    "infinity": with_a_number("c", -torch.inf),
}


def spoilt(failure, n, where, seed):
    states = good_states(n, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for k in where:
        states[k] = FAILURES[failure](states[k], generator)
    scores = {f"checkpoint{k}": k / n for k in range(n)}
    return CheckpointCollection(states, scores=scores)


def problems(collection):
    return [row.name for row in collection.describe().checkpoints if row.problem]


@pytest.mark.parametrize("failure", FAILURES)
@given(data=st.data())
def test_the_bad_ones_are_named_and_left_out(failure, data):
    n = data.draw(st.integers(5, 20))
    where = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=(n - 1) // 2 - 1))
    collection = spoilt(failure, n, sorted(where), seed=data.draw(st.integers(0, 2**16)))
    bad = [f"checkpoint{k}" for k in sorted(where)]
    assert problems(collection) == bad
    with pytest.warns(SoupWarning, match=f"Left out {len(bad)} of {n} .*'{bad[0]}'") as caught:
        healthy = collection.healthy()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert healthy.names == tuple(name for name in collection if name not in bad)
    assert healthy.scores == {name: collection.scores[name] for name in healthy}
    assert len(collection) == n
    healthy.check()
    assert problems(healthy) == []
    if "NaN" not in failure and failure != "infinity":
        collection.check()
        assert collection.strangers(collection) == bad
        verdict = judge(collection.relations(collection))
        assert "good to mix" not in verdict
        assert "collection.healthy()" in verdict


@given(n=st.integers(2, 20), seed=st.integers(0, 2**16), spread=st.floats(1e-4, 0.1))
def test_good_ones_are_left_as_they_are(n, seed, spread):
    states = good_states(n, seed, spread)
    collection = CheckpointCollection([*states, states[0]])  # a copy belongs to the others
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collection.healthy() is collection
    assert problems(collection) == []
    assert collection.strangers(collection) == []
    assert collection.describe().verdict[-1].endswith("good to mix.")


def test_a_wide_sweep_is_not_called_bad():
    """Distances that differ by a factor of a hundred, as learning rates do."""
    start, *_ = good_states(1, 0)
    generator = torch.Generator().manual_seed(0)
    for top in (0.3, 0.03):
        states = [
            {t: w + 0.3 * s * torch.randn(w.shape, generator=generator) for t, w in start.items()}
            for s in torch.logspace(-2, 0, 12) * top
        ]
        assert problems(CheckpointCollection(states)) == []


@pytest.mark.parametrize("failure", ["times 30", "zeros", "another start"])
def test_of_two_that_do_not_fit_neither_is_preferred(failure):
    collection = spoilt(failure, 2, [1], seed=0)
    assert problems(collection) == ["checkpoint0", "checkpoint1"]
    assert "rates that are too high: 2 of 2" in collection.describe().verdict[-1]
    with pytest.raises(CheckpointError, match=r"No checkpoint .* is healthy: 'checkpoint0' \("):
        collection.healthy()


@pytest.mark.parametrize("failure", ["noise of 20", "times 30", "zeros", "another start"])
def test_one_bad_of_three_is_named(failure):
    assert problems(spoilt(failure, 3, [0], seed=0)) == ["checkpoint0"]


def test_two_families_do_not_share_a_start():
    collection = CheckpointCollection([*good_states(3, 0), *good_states(3, 1)])
    assert "rates that are too high: 6 of 6 differ" in collection.describe().verdict[-1]


def test_a_verdict_says_what_was_measured():
    far = spoilt("times 30", 6, [4], seed=0).describe().verdict[-1]
    assert far.startswith("'checkpoint4' is far from the others and probably diverged (")
    assert "times the usual distance): leave it out with collection.drop('checkpoint4')" in far
    apart = spoilt("another start", 7, [2, 4], seed=0).describe().verdict[-1]
    assert apart.startswith(
        "'checkpoint2', 'checkpoint4' were not fine-tuned from the same weights"
    )
    assert "('checkpoint2': median cosine" in apart


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
@pytest.mark.parametrize("odd", [[0.0, 0.0], [-torch.inf, 0.0], [torch.nan, -torch.inf]])
def test_an_infinite_constant_stays_in_any_order(order, odd):
    states = good_states(4, 0)
    for state in states:
        state["mask"] = torch.tensor([0.0, -torch.inf])
    states[1]["mask"] = torch.tensor(odd)
    collection = CheckpointCollection([states[k] for k in order], names=[f"n{k}" for k in order])
    with pytest.warns(SoupWarning, match=r"1 of 4 checkpoints: 'n1' \('mask'"):
        healthy = collection.healthy()
    assert sorted(healthy) == ["n0", "n2", "n3"]
    assert healthy.healthy() is healthy
    healthy.check()


def test_infinities_without_a_majority_are_all_left_out():
    states = good_states(5, 0)
    for k in (0, 3):
        states[k]["c"][0, k] = torch.inf
    with pytest.warns(SoupWarning, match="2 of 5.*'checkpoint0' .*'checkpoint3' "):
        assert len(CheckpointCollection(states).healthy()) == 3


def test_what_was_read_before_changes_nothing():
    states = good_states(4, 0)
    for state in states:
        state["mask"] = torch.tensor([0.0, -torch.inf])
    collection = CheckpointCollection(states)
    collection["checkpoint2"]
    assert collection.healthy() is collection


def test_a_file_that_can_not_be_read_any_more_is_left_out(tmp_path):
    files = CheckpointCollection(good_states(4, 0)).save(tmp_path)
    files.path("checkpoint1").unlink()
    with pytest.warns(SoupWarning, match=r"'checkpoint1' \('.*can't be opened"):
        assert files.healthy().names == ("checkpoint0", "checkpoint2", "checkpoint3")


def test_the_remedy_for_a_file_that_was_cut_off_works(tmp_path):
    files = CheckpointCollection(good_states(4, 0)).save(tmp_path / "zoo")
    path = files.path("checkpoint1")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"checkpoint1\.safe.*move it to another folder, or"):
        CheckpointCollection.from_path(tmp_path / "zoo")
    path.rename(tmp_path / path.name)
    assert len(CheckpointCollection.from_path(tmp_path / "zoo")) == 3


def test_reads_each_file_once(tmp_path, monkeypatch):
    files = CheckpointCollection(good_states(4, 0)).save(tmp_path)
    opened = []
    original = CheckpointCollection.open
    monkeypatch.setattr(
        CheckpointCollection, "open", lambda self, name: opened.append(name) or original(self, name)
    )
    for look in (files.healthy, files.describe):
        look()
        assert opened == list(files.names)
        opened.clear()
    files.check()
    assert opened == []  # nothing is unread


def test_real_fine_tunings_and_a_network_of_another_start():
    zoo = make_digits_checkpoints(n_checkpoints=6, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zoo.checkpoints.healthy() is zoo.checkpoints
    other = make_digits_checkpoints(n_checkpoints=1, random_state=1).checkpoints["ft00"]
    states = {name: zoo.checkpoints[name] for name in zoo.checkpoints}
    huge = {t: 20 * w for t, w in states["ft01"].items()}
    collection = CheckpointCollection(states | {"other": other, "huge": huge})
    assert problems(collection) == ["other", "huge"]
