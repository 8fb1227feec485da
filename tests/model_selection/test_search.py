"""Fine-tune and soup in one estimator."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback
from torch import nn

from sksoup import CheckpointCollection, GreedySoup, MEHLSoup

from ..zoo import PlainNet, Zoo
from .searches import net_of, same_soup, search_of, unrelated


def test_candidates_are_fine_tuned_from_one_start_and_souped(zoo: Zoo):
    net = net_of()
    before = [p.clone() for p in net.module.parameters()]
    search = search_of(net, soup=MEHLSoup(layerwise=True, random_state=0)).fit(zoo.X, zoo.y)
    assert search.checkpoints_.names == tuple(f"candidate00{k}" for k in range(4))
    assert search.soup_.coef_.shape == (4, 4)
    assert unrelated(search.checkpoints_) == []
    results = search.cv_results_
    assert len(results["params"]) == len(results["mean_test_score"]) == 4
    assert results["rank_test_score"][search.best_index_] == 1
    assert search.best_score_ == max(results["mean_test_score"])
    assert search.best_params_ == results["params"][search.best_index_]
    assert results["error"] == [None] * 4
    assert (results["mean_fit_time"] > 0).all()
    assert search.score(zoo.X, zoo.y) == search.soup_.score(zoo.X, zoo.y)
    assert (search.predict(zoo.X) == search.soup_.predict(zoo.X)).all()
    assert search.predict_proba(zoo.X).shape == (60, 3)
    assert search.classes_.tolist() == [0, 1, 2]
    assert search.n_features_in_ == 4
    after = net.module.parameters()  # the user's network is left alone
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_known_scores_rank_for_greedy(zoo: Zoo):
    search = search_of().fit(zoo.X, zoo.y)
    assert search.soup_.individual_scores_ == dict(search.checkpoints_.scores)
    other = search_of(soup=GreedySoup(scoring="neg_log_loss")).fit(zoo.X, zoo.y)
    assert other.checkpoints_.scores is None


def test_the_soup_may_call_the_module_its_own_way(zoo: Zoo):
    """The trial before training does so, too."""

    class Scaled(PlainNet):
        def forward(self, x, scale=None):
            return super().forward(x * (1 if scale is None else scale))

    asked = []

    def forward(module, X):
        asked.append(len(X))
        return module(X, scale=2.0)

    soup = MEHLSoup(max_epochs=1, random_state=0, forward=forward)
    search_of(net_of(Scaled()), soup=soup, n_iter=2).fit(zoo.X, zoo.y)
    assert asked.count(1) == 2  # one row each, before training and before the search


def test_labels_may_be_names(zoo: Zoo):
    names = np.array(["ant", "bee", "cat"])
    search = search_of().fit(zoo.X, names[zoo.y])
    plain = search_of().fit(zoo.X, zoo.y)
    assert search.classes_.tolist() == names.tolist()
    assert (search.predict(zoo.X) == names[plain.predict(zoo.X)]).all()
    assert search.best_score_ == plain.best_score_
    y = names[zoo.y]
    y[:5] = "dog"
    first = [(np.arange(60), np.arange(5, 60))]
    with pytest.raises(ValueError, match=r"held-out part lacks labels.*dog"):
        search_of(cv=first).fit(zoo.X, y)


def test_regression(zoo: Zoo):
    y = zoo.X[:, :3].astype(np.float32)
    net = net_of(kind=NeuralNetRegressor, criterion=nn.MSELoss)
    search = search_of(net).fit(zoo.X, y)
    assert is_regressor(search)
    assert not is_classifier(search)
    assert search.predict(zoo.X).shape == (60, 3)
    assert not hasattr(search, "predict_proba")


def test_inside_cross_validation_and_pickle(zoo: Zoo):
    scores = cross_val_score(search_of(n_iter=2), zoo.X, zoo.y, cv=2)
    assert scores.shape == (2,)
    search = search_of(n_iter=2).fit(zoo.X, zoo.y)
    again = pickle.loads(pickle.dumps(search))
    assert (again.predict(zoo.X) == search.predict(zoo.X)).all()


def test_probabilities_instead_of_logits_are_refused_before_training(zoo: Zoo):
    with pytest.raises(ValueError, match="soups want logits"):
        search_of(net_of(criterion=nn.NLLLoss)).fit(zoo.X, zoo.y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_iter": 0}, "n_iter must be"),
        ({"soup": GreedySoup(CheckpointCollection([nn.Linear(4, 3)]))}, "already has checkpoints"),
    ],
)
def test_bad_parameters(zoo: Zoo, settings, message):
    with pytest.raises(ValueError, match=message):
        search_of(**settings).fit(zoo.X, zoo.y)


def test_labels_the_module_can_not_have_are_told_before_training(zoo: Zoo):
    class Stop(Callback):
        def on_train_begin(self, *args, **kwargs):
            raise RuntimeError("trained")

    net = net_of(callbacks=[("stop", Stop())])
    with pytest.raises(ValueError, match="can't be matched to the module's outputs"):
        search_of(net).fit(zoo.X, np.arange(60) % 4)


def test_unfitted():
    with pytest.raises(NotFittedError):
        search_of().predict(np.ones((2, 4), np.float32))


def test_rows_on_a_device(zoo: Zoo):
    class Elsewhere(torch.Tensor):
        """What validation takes for a tensor of an accelerator."""

        device = torch.device("cuda")

    X = torch.as_tensor(zoo.X).as_subclass(Elsewhere)
    search = search_of(n_iter=2).fit(X, zoo.y)
    assert same_soup(search, search_of(n_iter=2).fit(zoo.X, zoo.y))
