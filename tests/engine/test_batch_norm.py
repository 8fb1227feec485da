"""BatchNorm's statistics: mixed, re-estimated, or the better of the two."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from torch import nn

from sksoup import (
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    Recipe,
    SoupWarning,
    UniformSoup,
    mix,
)

from ..zoo import Net, PaperLearned, PaperMEHL, Zoo, make_zoo, same_tensors

SOUPS = [
    UniformSoup(),
    GreedySoup(),
    PaperLearned(max_epochs=2, random_state=0),
    PaperMEHL(layerwise=True, model_batch_size=3, max_epochs=2, random_state=0),
]
every_soup = pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)
STATISTICS = ("norm.running_mean", "norm.running_var")


def expected_statistics(module, X):
    """Of the layer before the norm, by hand: one batch of all rows."""
    with torch.no_grad():
        hidden = module.hidden(torch.as_tensor(X))
    return hidden.mean(0), hidden.var(0)


@every_soup
def test_recalibrated_statistics_are_those_of_the_held_out_rows(zoo: Zoo, soup, tmp_path):
    soup = clone(soup).set_params(batch_norm="recalibrate", batch_size=None)
    if isinstance(soup, GreedySoup):
        soup.set_params(min_improvement=-1)  # keep all
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.recalibrated_ == STATISTICS == soup.recipe_.recalibrated
    mean, variance = expected_statistics(soup.module_, zoo.X)
    torch.testing.assert_close(soup.module_.norm.running_mean, mean)
    torch.testing.assert_close(soup.module_.norm.running_var, variance)
    mixed = mix(zoo.checkpoints, soup.coef_, layers=soup.layers_)
    state = soup.state_dict()
    for name in mixed:  # all else is what mix gives, the counter too
        assert (name in STATISTICS) != torch.equal(state[name], mixed[name]), name
    assert soup.module_.norm.momentum == 0.1
    assert not soup.module_.norm.training
    assert soup.counts_.rows_recalibrated % 60 == 0 < soup.counts_.rows_recalibrated
    soup.save(tmp_path / "soup.safetensors")
    checked = Recipe.load(tmp_path / "soup.safetensors").verify(state, zoo.checkpoints)
    assert set(checked.unchecked) == set(STATISTICS)
    assert not checked.differing


@every_soup
def test_the_default_is_to_mix(zoo: Zoo, soup):
    plain = clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert plain.recalibrated_ == ()
    assert plain.counts_.rows_recalibrated == 0
    mixed = mix(zoo.checkpoints, plain.coef_, layers=plain.layers_)
    assert same_tensors(plain.state_dict(), mixed)


@every_soup
@settings(max_examples=8)
@given(seed=st.integers(0, 99))
def test_auto_is_at_least_as_good_as_mixing(soup, seed):
    zoo = make_zoo(5, seed)
    soup = clone(soup).set_params(batch_norm="auto").fit(zoo.checkpoints, zoo.X, zoo.y)
    mixed = mix(zoo.checkpoints, soup.coef_, layers=soup.layers_)
    module = zoo.checkpoints.build_module().eval()
    module.load_state_dict(mixed)
    with torch.no_grad():
        score = (module(torch.as_tensor(zoo.X)).argmax(1).numpy() == zoo.y).mean()
    assert soup.score(zoo.X, zoo.y) >= score
    assert bool(soup.recalibrated_) == (soup.score(zoo.X, zoo.y) > score)
    if isinstance(soup, GreedySoup):
        assert soup.score(zoo.X, zoo.y) >= max(soup.individual_scores_.values())


def test_greedy_candidates_are_recalibrated_and_counted_apart(zoo: Zoo):
    soup = GreedySoup(batch_norm="recalibrate", early_rejection=False, batch_size=None)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    n_kept = len(soup.ingredients_)
    assert soup.counts_.rows_recalibrated == 60 * (6 + (n_kept > 1))  # candidates, and the result
    assert soup.counts_.rows_forward == 60 * 13
    names = list(zoo.checkpoints)
    for tried in soup.path_[1:2]:
        subset = [names.index(soup.path_[0]["candidate"]), names.index(tried["candidate"])]
        coef = np.zeros(7)
        coef[subset] = 0.5
        module = zoo.checkpoints.build_module().eval()
        module.load_state_dict(mix(zoo.checkpoints, coef))
        mean, variance = expected_statistics(module, zoo.X)
        module.norm.running_mean.copy_(mean)
        module.norm.running_var.copy_(variance)
        with torch.no_grad():
            right = module(torch.as_tensor(zoo.X)).argmax(1).numpy() == zoo.y
        assert tried["score"] == right.mean()


def test_a_single_ingredient_keeps_its_own_statistics(zoo: Zoo):
    soup = GreedySoup(batch_norm="recalibrate", min_improvement=2.0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.recalibrated_ == ()
    assert same_tensors(soup.state_dict(), zoo.checkpoints[soup.ingredients_[0]])


def test_rows_sorted_by_label_give_the_same_variances(zoo: Zoo):
    order = np.argsort(zoo.y, kind="stable")
    soup = UniformSoup(batch_norm="recalibrate", batch_size=20)
    soup.fit(zoo.checkpoints, zoo.X[order], zoo.y[order])
    _, variance = expected_statistics(soup.module_, zoo.X)
    ratio = soup.module_.norm.running_var / variance
    assert 0.8 < ratio.mean() < 1.2
    blocks = [expected_statistics(soup.module_, zoo.X[order][k : k + 20])[1] for k in (0, 20, 40)]
    assert (torch.stack(blocks).mean(0) / variance).mean() < 0.7  # what in-order batches would give


def test_the_search_normalises_by_the_minibatch(zoo: Zoo):
    """The first loss is that of the mean in train mode, dropout off."""
    soup = PaperMEHL(batch_norm="recalibrate", batch_size=None, max_epochs=1, shuffle=False)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    module = zoo.checkpoints.build_module().eval()
    module.load_state_dict(mix(zoo.checkpoints, np.full(7, 1 / 7)))
    module.norm.train()
    loss = nn.functional.cross_entropy(module(torch.as_tensor(zoo.X)), torch.as_tensor(zoo.y))
    assert soup.history_[0]["loss"][0] == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:lr=5")
def test_variances_that_extrapolation_would_make_negative_are_told(zoo: Zoo):
    soup = PaperMEHL(layerwise=True, lr=5.0, max_epochs=3, random_state=0)
    with pytest.warns(
        SoupWarning, match=r"BatchNorm's running variances in 'norm.running_var' would be"
    ):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    variances = soup.module_.norm.running_var
    assert (variances >= 0).all()
    assert (variances == 0).any()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", "With these coefficients"
        )  # measured anew, they are what they should be
        soup.set_params(batch_norm="recalibrate").fit(zoo.checkpoints, zoo.X, zoo.y)
    assert (soup.module_.norm.running_var > 0).all()


@pytest.mark.parametrize("kind", [MEHLSoup, LearnedSoup])
@pytest.mark.parametrize("batch_size", [1, 59])
def test_a_minibatch_of_one_row_is_refused_before_the_search(zoo: Zoo, kind, batch_size):
    with pytest.raises(ValueError, match=r"leave a minibatch of one|each has only one row"):
        kind(batch_norm="recalibrate", batch_size=batch_size).fit(zoo.checkpoints, zoo.X, zoo.y)


@pytest.mark.parametrize("policy", ["recalibrate", "auto"])
def test_networks_without_batch_norm_do_not_care(zoo64: Zoo, policy):
    soup = PaperMEHL(batch_norm=policy, max_epochs=1, random_state=0, batch_size=59)
    soup.fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    plain = PaperMEHL(max_epochs=1, random_state=0, batch_size=59)
    plain.fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert soup.recalibrated_ == ()


def test_bad_policy(zoo: Zoo):
    with pytest.raises(ValueError, match="batch_norm must be one of 'average', 'recali"):
        UniformSoup(batch_norm="fresh").fit(zoo.checkpoints, zoo.X, zoo.y)


def test_convolutions_and_frozen_statistics():
    """2-d norms are re-estimated over space, too; norms without running statistics are left out."""
    torch.manual_seed(0)

    def build():
        return nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(),
            nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 2, 2), nn.Flatten(),
        )  # fmt: skip

    states = [build().state_dict() for _ in range(3)]
    X, y = torch.randn(40, 1, 3, 3), torch.arange(40) % 2
    soup = UniformSoup(batch_norm="recalibrate", batch_size=None)
    soup.fit(CheckpointCollection(states, module=build), X, y)
    assert soup.recalibrated_ == ("1.running_mean", "1.running_var")
    with torch.no_grad():
        hidden = soup.module_[0](X)
    torch.testing.assert_close(soup.module_[1].running_mean, hidden.mean((0, 2, 3)))


@pytest.mark.parametrize("policy", ["recalibrate", "auto"])
def test_one_row_has_no_variance(zoo: Zoo, policy):
    soup = UniformSoup(batch_norm=policy)
    if policy == "recalibrate":
        with pytest.raises(ValueError, match=r"with 1 rows .* each has only one row"):
            soup.fit(zoo.checkpoints, zoo.X[:1], zoo.y[:1])
        with pytest.raises(ValueError, match="batch_size=1 each has only one row"):
            clone(soup).set_params(batch_size=1).fit(zoo.checkpoints, zoo.X, zoo.y)
        return
    mean = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    soup.fit(zoo.checkpoints, zoo.X[:1], zoo.y[:1])
    assert soup.recalibrated_ == ()
    assert same_tensors(soup.state_dict(), mean.state_dict())
    greedy = GreedySoup(batch_norm="auto", batch_size=1).fit(zoo.checkpoints, zoo.X, zoo.y)
    plain = GreedySoup(batch_size=1).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert greedy.ingredients_ == plain.ingredients_
    assert greedy.recalibrated_ == ()


def test_the_iterate_is_chosen_by_statistics_like_those_of_the_soup(zoo: Zoo):
    """Stored statistics that say nothing do not decide it."""
    states = [dict(zoo.checkpoints[name]) for name in zoo.checkpoints]
    for state in states:
        state["norm.running_mean"] = torch.full((6,), 50.0)
    checkpoints = CheckpointCollection(states, module=Net)
    soup = PaperMEHL(batch_norm="recalibrate", validation_fraction=0.3, max_epochs=3, lr=0.2,
                    batch_size=None, random_state=0)  # fmt: skip
    soup.fit(checkpoints, zoo.X, zoo.y)
    assert soup.history_[0]["validation_loss"] < 5
    assert np.ptp(soup.coef_) > 0  # not the start


def test_rows_are_counted_once_some_are_set_aside(zoo: Zoo):
    soup = PaperMEHL(batch_norm="recalibrate", validation_fraction=0.15, max_epochs=1)
    with pytest.raises(ValueError, match="9 rows in minibatches of 4 leave a minibatch of one"):
        clone(soup).set_params(batch_size=4).fit(zoo.checkpoints, zoo.X, zoo.y)
    clone(soup).set_params(batch_size=59).fit(zoo.checkpoints, zoo.X, zoo.y)  # 51 and 9


def test_a_channel_that_is_dead_in_all_is_no_news(zoo: Zoo):
    """Pretrained networks have channels whose variance is 0."""
    states = [dict(zoo.checkpoints[name]) for name in zoo.checkpoints]
    for state in states:
        state["norm.running_var"] = torch.tensor([0.0, 1, 1, 1, 1, 1])
    ckpts = CheckpointCollection(states, module=zoo.checkpoints.module)
    soup = PaperMEHL(lr=1.0, max_epochs=20, random_state=0).fit(ckpts, zoo.X, zoo.y)
    assert soup.coef_.min() < 0
    assert not any("BatchNorm's variances" in said for said in soup.warnings_)


class Shared(nn.Module):
    """A BatchNorm layer with two names, as in ``self.block = Sequential(self.fc, self.bn)``."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.block = nn.Sequential(self.bn, nn.Linear(4, 3))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.block(X)


@pytest.mark.parametrize("left_out", ["none", "bn."])
def test_a_layer_with_two_names(zoo: Zoo, left_out, tmp_path):
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = Shared().train()
        net(torch.randn(50, 4) * 3 + seed)
        states.append({n: v for n, v in net.state_dict().items() if not n.startswith(left_out)})
    checkpoints = CheckpointCollection(states, module=Shared).save(tmp_path / "zoo")
    soup = UniformSoup(batch_norm="recalibrate").fit(checkpoints, zoo.X, zoo.y)
    which = {n for n in states[0] if n.endswith(("running_mean", "running_var"))}
    assert {*soup.recalibrated_} == which
    soup.save(tmp_path / "soup.safetensors")
    assert soup.recipe_.verify(tmp_path / "soup.safetensors", checkpoints).ok
    there = soup.interpolate("checkpoint0", 1.0)
    assert torch.equal(there.module_.bn.running_mean, soup.module_.bn.running_mean)


def test_files_without_counters(zoo: Zoo, tmp_path):
    """As written before torch 0.4.1, and torchvision's weights: load_state_dict adds them."""

    def build() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))

    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(build().state_dict())
        if seed:
            del states[-1]["0.num_batches_tracked"]
            build().load_state_dict(dict(states[-1]))
    for some in (states[1:], states, states[::-1]):
        checkpoints = CheckpointCollection(some, module=build)
        assert "0.num_batches_tracked" not in checkpoints.layout
        soup = UniformSoup().fit(checkpoints, zoo.X, zoo.y)
        soup.save(tmp_path / "soup.safetensors")
        assert soup.recipe_.verify(tmp_path / "soup.safetensors", checkpoints).ok
    only = GreedySoup().fit(CheckpointCollection(states[:1], module=build), zoo.X, zoo.y)
    assert "0.num_batches_tracked" in only.state_dict()


def test_variances_that_half_precision_can_not_hold_are_refused(zoo: Zoo):
    states = [nn.BatchNorm1d(4).half().state_dict() for _ in range(2)]
    checkpoints = CheckpointCollection(states, module=lambda: nn.BatchNorm1d(4))
    soup = UniformSoup(batch_norm="recalibrate")
    soup.fit(checkpoints, zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match=r"'running_var' can't be stored: it reaches"):
        soup.fit(checkpoints, 1000 * zoo.X, zoo.y)
