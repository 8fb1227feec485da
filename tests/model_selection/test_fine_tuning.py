"""Candidates are fine-tuned from one start; those that fail are left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.exceptions import FitFailedWarning
from sklearn.model_selection import KFold
from torch import nn

from sksoup import SoupWarning

from ..zoo import PlainNet, Zoo, same_tensors
from .searches import net_of, search_of, unrelated


def test_each_candidate_is_the_net_trained_by_hand(zoo: Zoo):
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))  # nothing random
    search = search_of(
        net_of(module), param_distributions={"lr": [0.05]}, n_iter=1, cv=KFold(3)
    ).fit(zoo.X, zoo.y)
    train, held_out = next(iter(KFold(3).split(zoo.X)))
    net = clone(net_of(module)).set_params(lr=0.05)
    net.fit(zoo.X[train], zoo.y[train])
    assert same_tensors(search.checkpoints_["candidate000"], dict(net.module_.state_dict()))
    assert search.best_score_ == net.score(zoo.X[held_out], zoo.y[held_out])
    assert search.soup_.score(zoo.X[held_out], zoo.y[held_out]) == search.best_score_


def test_the_same_seed_gives_the_same_soup_and_leaves_global_state(zoo: Zoo):
    net = net_of(iterator_train__shuffle=True)
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = search_of(net).fit(zoo.X, zoo.y)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    torch.manual_seed(2)
    b = search_of(net, n_jobs=2).fit(zoo.X, zoo.y)
    assert same_tensors(a.soup_.state_dict(), b.soup_.state_dict())
    c = search_of(net, random_state=1).fit(zoo.X, zoo.y)
    assert not same_tensors(a.soup_.state_dict(), c.soup_.state_dict())


def test_a_module_class_is_drawn_once_and_said(zoo: Zoo):
    with pytest.warns(SoupWarning, match=r"not an instance.*are now drawn once for all"):
        search = search_of(net_of(PlainNet)).fit(zoo.X, zoo.y)
    assert unrelated(search.checkpoints_) == []


def test_a_fitted_net_is_the_start(zoo: Zoo):
    net = net_of(PlainNet, max_epochs=20).fit(zoo.X, zoo.y)
    start = {name: w.clone() for name, w in net.module_.state_dict().items()}
    search = search_of(net, param_distributions={"lr": [0.0]}, n_iter=1).fit(zoo.X, zoo.y)
    assert same_tensors(search.checkpoints_["candidate000"], start)


def test_failed_candidates_are_reported_and_left_out(zoo: Zoo):
    params = {"lr": [0.01, float("nan"), 0.02, 0.03]}
    with pytest.warns(FitFailedWarning, match=r"1 of 4 candidates failed.*diverged") as caught:
        search = search_of(param_distributions=params).fit(zoo.X, zoo.y)
    assert caught[0].filename == __file__
    errors = search.cv_results_["error"]
    (bad,) = [k for k, error in enumerate(errors) if error]
    assert np.isnan(search.cv_results_["mean_test_score"][bad])
    assert search.cv_results_["rank_test_score"][bad] == 4
    assert f"candidate00{bad}" not in search.checkpoints_
    assert len(search.checkpoints_) == 3


def test_when_all_fail_nothing_is_mixed(zoo: Zoo):
    with pytest.raises(ValueError, match=r"All 2 candidates failed.*no_such"):
        search_of(param_distributions={"no_such": [1, 2]}, n_iter=2).fit(zoo.X, zoo.y)


def test_a_changed_architecture_has_no_common_start(zoo: Zoo):
    class Wide(nn.Module):
        def __init__(self, width=5):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

        def forward(self, X):
            return self.layers(X)

    params = {"module__width": [5, 6]}
    with (
        pytest.warns(FitFailedWarning, match="change the architecture"),
        pytest.warns(SoupWarning, match="not an instance"),
    ):
        search = search_of(net_of(Wide), param_distributions=params, n_iter=2).fit(zoo.X, zoo.y)
    assert len(search.checkpoints_) == 1


class ScratchNet(ClassifierMixin, BaseEstimator):
    """Anything with ``module_``: trains a module it may or may not initialize anew."""

    def __init__(self, module=None, fresh=False, lr=0.1):
        self.module = module
        self.fresh = fresh
        self.lr = lr

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        kind = nn.Linear(40, 10)
        self.module_ = kind if self.fresh else self.module
        with torch.no_grad():
            for p in self.module_.parameters():
                p += self.lr * 0.01 * torch.randn_like(p)
        return self

    def predict(self, X):
        with torch.no_grad():
            return self.module_(torch.as_tensor(X)).argmax(1).numpy()


def test_an_estimator_that_initialises_per_clone_is_refused(tmp_path):
    X, y = np.random.default_rng(0).normal(size=(60, 40)).astype(np.float32), np.arange(60) % 10
    start = nn.Linear(40, 10)
    search = search_of(ScratchNet(start)).fit(X, y)
    assert len(search.checkpoints_) == 4
    with pytest.raises(ValueError, match=r"did not start from the same weights.*ScratchNet"):
        search_of(ScratchNet(start, fresh=True)).fit(X, y)
    search_of(ScratchNet(start), save_dir=tmp_path).fit(X, y)
    with pytest.raises(ValueError, match=r"the architecture of .* is not known"):
        search_of(ScratchNet(start), save_dir=tmp_path).fit(X, y)
