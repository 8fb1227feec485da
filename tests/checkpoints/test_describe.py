from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    SoupWarning,
    UniformSoup,
)
from sksoup.checkpoints import relations

from ..zoo import Zoo, around


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))


@given(n=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_numbers_are_those_of_plain_linear_algebra(n, seed):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(n, 12)) + rng.normal(size=12)
    states = [{"w": torch.as_tensor(row.reshape(3, 4)), "frozen": torch.ones(2)} for row in W]
    summary = CheckpointCollection(states).describe()
    for k, row in enumerate(summary.checkpoints):
        others = np.delete(W, k, axis=0)
        cosines = others @ W[k] / np.linalg.norm(W[k]) / np.linalg.norm(others, axis=1)
        assert row.cosine == pytest.approx(sorted(cosines)[(n - 1) // 2], abs=1e-9)
        assert row.distance == pytest.approx(np.linalg.norm(W[k] - np.median(W, axis=0)))
        assert row.norm == pytest.approx(np.sqrt(W[k] @ W[k] + 2))
    assert summary.identical == ("frozen",)
    assert summary.n_parameters == 14
    assert summary.dtypes == {"float64": 1, "float32": 1}


def test_fine_tunings_of_one_start_are_good_to_mix():
    torch.manual_seed(0)
    summary = CheckpointCollection(around(wide(), 4)).describe()
    assert "good to mix" in summary.verdict[-1]
    assert min(row.cosine for row in summary.checkpoints) > 0.99


def test_networks_without_a_common_start_are_told():
    torch.manual_seed(0)
    summary = CheckpointCollection([wide() for _ in range(4)]).describe()
    assert "rates that are too high: 4 of 4 differ" in summary.verdict[-1]
    assert "A soup of them will not work" in str(summary)


def test_one_stranger_is_named():
    torch.manual_seed(0)
    nets = CheckpointCollection([*around(wide(), 4), wide()], names=[*"abcd", "stranger"])
    verdict = nets.describe().verdict[-1]
    assert verdict.startswith("'stranger' was not fine-tuned from the same weights")
    assert nets.strangers(nets) == ["stranger"]  # the same from a few numbers of each matrix
    assert nets.drop("stranger").describe().verdict[-1].endswith("good to mix.")


def test_copies_and_single_checkpoints():
    torch.manual_seed(0)
    a, b = around(wide(), 2)
    summary = CheckpointCollection({"a": a, "b": b, "again": a}).describe()
    assert [row.same_as for row in summary.checkpoints] == [None, None, "a"]
    assert "'again' repeats other checkpoints" in summary.verdict[0]
    assert "All checkpoints are the same" in CheckpointCollection([a, a]).describe().verdict[0]
    one = CheckpointCollection([a], scores={"checkpoint0": 0.5}).describe()
    assert one.verdict == ("One checkpoint: nothing to mix.",)
    assert one.to_dict()["checkpoints"][0]["cosine"] is None
    assert "0.5000" in str(one)


def test_the_table_has_a_column_for_every_number_and_a_note_of_copies():
    states = {"a": {"w": torch.full((2, 2), 3.0)}, "b": {"w": torch.tensor([[3.0, 3], [3, -3]])}}
    collection = CheckpointCollection(
        states | {"again": states["a"]}, scores={"a": 0.5, "b": 1.0, "again": 0.5}
    )
    assert str(collection.describe()).splitlines()[:4] == [
        "name   norm  distance  cosine   score",
        "a         6         0  1.0000  0.5000",
        "b         6         6  0.5000  1.0000  25 times the usual distance",
        "again     6         0  1.0000  0.5000  same as a",
    ]


def test_a_checkpoint_that_is_not_finite_is_a_row_with_its_problem():
    torch.manual_seed(0)
    states = {name: net.state_dict() for name, net in zip("abcd", around(wide(), 4), strict=True)}
    states["b"]["2.weight"][1, 1] = torch.nan
    collection = CheckpointCollection(states, scores=dict.fromkeys("abcd", 0.5))
    summary = collection.describe()
    assert [row.problem for row in summary.checkpoints] == [
        None,
        "'2.weight' holds NaN",
        None,
        None,
    ]
    assert summary.verdict[0] == "'b' can't be used: '2.weight' holds NaN."
    assert "collection.drop('b') or collection.healthy()" in summary.verdict[1]
    assert summary.verdict[-1].endswith("good to mix.")
    row = str(summary).splitlines()[2].split(maxsplit=5)
    assert row == ["b", "-", "-", "-", "0.5000", "'2.weight' holds NaN"]
    document = json.loads(json.dumps(summary.to_dict(), allow_nan=False))["checkpoints"][1]
    assert document["norm"] is document["distance"] is document["cosine"] is None
    with pytest.raises(CheckpointError, match=r"'2\.weight'.*collection\.healthy\(\)"):
        collection.check()  # what describe has seen of it is not taken for good


def test_nothing_usable_is_described_all_the_same():
    states = [{"w": torch.full((2, 2), torch.nan)}] * 7
    summary = CheckpointCollection(states).describe()
    assert summary.identical == ()
    assert "'checkpoint5', 'checkpoint6' can't be used either." in summary.verdict
    assert summary.verdict[-1] == "No checkpoint is left: nothing to mix."


@pytest.mark.parametrize("n", [1, 3])
def test_runs_that_diverged_in_one_tensor_are_described(n):
    states = [{"w": torch.randn(4, 4), "b": torch.full((3,), torch.nan)} for _ in range(n)]
    summary = CheckpointCollection(states).describe()
    assert [row.problem for row in summary.checkpoints] == ["'b' holds NaN"] * n
    assert summary.verdict[-1] == "No checkpoint is left: nothing to mix."


def test_a_matrix_that_is_infinite_in_all_but_one_is_described():
    """Such as an attention mask."""
    mask = torch.full((4, 4), -torch.inf).triu(1)
    w = torch.eye(4)
    states = [{"w": w + 0.01 * torch.randn(4, 4), "mask": mask.clone()} for _ in range(4)]
    states[3]["mask"] = torch.zeros(4, 4)
    problems = [row.problem for row in CheckpointCollection(states).describe().checkpoints]
    assert problems == [None] * 3 + ["'mask' is finite, but infinite in most others"]


def test_a_file_that_can_not_be_read_is_a_row_with_its_problem(tmp_path):
    torch.manual_seed(0)
    files = CheckpointCollection(around(wide(), 4)).save(tmp_path)
    path = files.path("checkpoint2")
    path.write_bytes(path.read_bytes()[:-50])
    summary = files.describe()
    assert "checkpoint2.safetensors" in summary.checkpoints[2].problem
    assert math.isnan(summary.checkpoints[2].norm)
    assert summary.verdict[-1].endswith("good to mix.")


def test_ready_for_json():
    torch.manual_seed(0)
    summary = CheckpointCollection(around(wide(), 3)).describe()
    document = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert [row["name"] for row in document["checkpoints"]] == [f"checkpoint{k}" for k in range(3)]


def test_infinite_constants_and_integers_do_no_harm():
    mask = torch.tensor([0.0, -torch.inf])
    states = [{"w": torch.ones(2, 2) * k, "mask": mask, "n": torch.tensor(k)} for k in (1, 2)]
    summary = CheckpointCollection(states).describe()
    assert summary.identical == ("mask",)
    assert all(row.cosine == pytest.approx(1) for row in summary.checkpoints)


def test_fitting_warns_of_unrelated_ingredients(zoo: Zoo):
    torch.manual_seed(0)
    strangers = CheckpointCollection([wide() for _ in range(3)], module=wide)
    with pytest.warns(SoupWarning, match="were not fine-tuned from the same") as caught:
        UniformSoup().fit(strangers, zoo.X, zoo.y)
    assert caught[0].filename == __file__
    related = CheckpointCollection(around(wide(), 3), module=wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UniformSoup().fit(related, zoo.X, zoo.y)


@pytest.mark.parametrize("shared", [True, False])
def test_a_regression_soup_of_strangers_is_called_noise(shared):
    """Nets that are each good: from one start their mean is, too; from several it is noise."""

    def build():
        return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))

    torch.manual_seed(0)
    X = torch.rand(400, 2) * 4 - 2
    y = torch.sin(2 * X[:, 0]) + X[:, 1]

    def train(net, steps, rows):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(steps):
            loss = (net(X[rows])[:, 0] - y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return net

    start = train(build(), 400, slice(0, 200))
    nets = []
    for k in range(3):
        net = copy.deepcopy(start) if shared else build()
        nets.append(train(net, 20 if shared else 420, slice(50 * k, 200)))
    checkpoints = CheckpointCollection(nets)
    val = X[200:], y[200:]
    best = BestCheckpoint(task="regression").fit(checkpoints, *val).score(*val)
    assert best > 0.9
    soup = UniformSoup(task="regression")
    if shared:
        assert soup.fit(checkpoints, *val).score(*val) > 0.9
        return
    with pytest.warns(
        SoupWarning,
        match="rates that are too high: 3 of 3",
    ):
        soup.fit(checkpoints, *val)
    assert soup.score(*val) < 0.5
    assert GreedySoup(task="regression").fit(checkpoints, *val).score(*val) >= best


def test_medians_of_cosines_are_those_of_all_at_once(monkeypatch):
    points = np.random.default_rng(0).normal(size=(11, 5))
    points[[2, 9]] = 0
    whole = relations.median_cosines(points)
    for block in (1, 4, 11):
        monkeypatch.setattr(relations, "BLOCK", block)
        np.testing.assert_allclose(relations.median_cosines(points), whole, atol=1e-15)
    unit = points[0] / np.linalg.norm(points[0])
    others = [p @ unit / (np.linalg.norm(p) or 1) for p in points[1:]]
    assert np.isclose(whole[0], sorted(others)[5])


def test_a_random_head_of_each_run_is_named():
    body = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40)).state_dict()

    def runs(head: bool) -> CheckpointCollection:
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(5, 40, generator=generator)
        states = []
        for _ in range(6):
            state = {n: v + 0.01 * torch.randn(v.shape, generator=generator)
                     for n, v in {**body, "head.weight": one}.items()}  # fmt: skip
            if head:
                state["head.weight"] = 0.05 * torch.randn(5, 40, generator=generator) + 0.02
            states.append(state)
        return CheckpointCollection(states)

    assert "good to mix" in runs(head=False).describe().verdict[-1]
    said = runs(head=True).describe().verdict
    assert "good to mix" in said[-2]
    assert said[-1].startswith("But the values of 'head.weight' have little in common (mean cos")
    assert "random head of its own" in said[-1]
