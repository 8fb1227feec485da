"""Slow bfloat16 is warned of before the search; the user's own autocast is respected."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    PrunedSoup,
    SoupWarning,
)
from sksoup.engine import precision
from sksoup.inspection import interpolation_path

from ..zoo import PaperLearned, PaperMEHL, Zoo


@pytest.fixture
def processor(monkeypatch):
    """Let bfloat16 take so many times as long as float32."""

    def pretend(slower: float) -> None:
        times = {torch.float32: 0.5, torch.bfloat16: 0.5 * slower}
        monkeypatch.setattr(precision, "seconds", times.__getitem__)

    return pretend


@pytest.mark.parametrize("kind", [PaperMEHL, PaperLearned])
def test_slow_bfloat16_is_warned_of_before_the_search(zoo: Zoo, processor, kind):
    processor(20.0)
    soup = kind(precision="bf16", max_epochs=1, random_state=0, device="cpu")
    message = r"is slow on this processor: .* takes 20 times .*instructions.*Use precision='fp32'"
    with warnings.catch_warnings():
        warnings.simplefilter("error", SoupWarning)  # raised, so no step can come before
        with pytest.raises(SoupWarning, match=message):
            soup.fit(zoo.checkpoints, zoo.X, zoo.y)
        soup.set_params(precision="fp32").fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.warns(SoupWarning, match=message) as caught:
        soup.set_params(precision="bf16").fit(zoo.checkpoints, zoo.X, zoo.y)
    assert caught[0].filename == __file__
    processor(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SoupWarning)
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)


def test_accelerators_are_not_measured(processor):
    processor(20.0)
    assert precision.judge_bfloat16(torch.device("cuda")) is None


def test_it_is_measured():
    assert precision.seconds(torch.float32) > 0
    assert precision.seconds(torch.bfloat16) > 0


SOUPS = [
    BestCheckpoint(), GreedySoup(), PrunedSoup(), CheckpointEnsemble(),
    LearnedSoup(max_epochs=1, random_state=0),
    MEHLSoup(layerwise=True, max_epochs=1, random_state=0),
]  # fmt: skip


def scores_by_hand(zoo: Zoo) -> dict[str, float]:
    """Of each checkpoint, in a module of its own."""
    found = {}
    for name in zoo.checkpoints:
        net = zoo.checkpoints.build_module().eval()
        net.load_state_dict(zoo.checkpoints[name])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = net(torch.as_tensor(zoo.X))
        found[name] = float((outputs.argmax(dim=1).numpy() == zoo.y).mean())
    return found


@pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)
def test_checkpoints_have_their_own_weights_within_autocast(zoo: Zoo, soup, tmp_path):
    """Autocast keeps the converted weights of a module until its outermost context ends."""
    expected = scores_by_hand(zoo)
    assert len(set(expected.values())) > 1
    soup = clone(soup).set_params(device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
        score = soup.score(zoo.X, zoo.y)
    if hasattr(soup, "individual_scores_"):
        assert soup.individual_scores_ == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert soup.score(zoo.X, zoo.y) == score
    if not isinstance(soup, CheckpointEnsemble):
        net = zoo.checkpoints.build_module().eval()
        net.load_state_dict(soup.state_dict())
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            alone = net(torch.as_tensor(zoo.X)).argmax(dim=1).numpy()
        assert score == (alone == zoo.y).mean()


class Autocast(nn.Module):
    """A network that computes in bfloat16 by itself."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.network(x)


@pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_outputs_in_bfloat16_are_widened(zoo: Zoo, soup, task):
    """They ended in a TypeError, since numpy has no such dtype."""
    states = {n: {f"network.{k}": w for k, w in s.items()} for n, s in zoo.checkpoints.items()}
    collection = CheckpointCollection(
        states, module=lambda: Autocast(zoo.checkpoints.build_module())
    )
    soup = clone(soup).set_params(device="cpu", task=task)
    with warnings.catch_warnings(action="ignore"):
        soup.fit(collection, zoo.X, zoo.y if task == "classification" else np.eye(3)[zoo.y])
    found = soup.predict_proba(zoo.X) if task == "classification" else soup.predict(zoo.X)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    if task == "classification":
        assert soup.score(zoo.X, zoo.y, np.ones(len(zoo.y))) == soup.score(zoo.X, zoo.y)
        if hasattr(soup, "individual_scores_"):
            assert soup.individual_scores_ == scores_by_hand(zoo)


def test_a_path_within_autocast_and_what_is_stored_there(zoo: Zoo, tmp_path):
    soup = BestCheckpoint(memory=tmp_path, device="cpu").fit(zoo.checkpoints, zoo.X, zoo.y)
    scores = soup.individual_scores_
    start = zoo.checkpoints[min(scores, key=scores.get)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        path = interpolation_path(start, soup, zoo.X, zoo.y, t=2)
        assert len(set(path.scores)) == 2
        again = clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert again.counts_.n_forward == soup.counts_.n_forward > 0  # not those of float32
