"""Fine-tune and soup in one estimator."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GroupShuffleSplit, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    MEHLSoup,
    SoupWarning,
)
from sksoup.model_selection import SoupSearchCV

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
    with pytest.raises(ValueError, match=r"soups need logits.*softmax.*CrossEntropyLoss"):
        search_of(net_of(criterion=nn.NLLLoss)).fit(zoo.X, zoo.y)
    net = net_of(one_logit(nn.Sigmoid()), NeuralNetBinaryClassifier, criterion=nn.BCELoss())
    with pytest.raises(ValueError, match=r"soups need logits.*sigmoid.*BCEWithLogitsLoss"):
        search_of(net).fit(zoo.X, zoo.y > 0)


def one_logit(last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 1), last, nn.Flatten(0))


def test_probabilities_are_trained_with_if_the_soup_makes_logits_of_them(zoo: Zoo):
    kind = NeuralNetBinaryClassifier
    net = net_of(one_logit(nn.Sigmoid()), kind, criterion=nn.BCELoss)
    soup = GreedySoup(forward=lambda module, X: torch.logit(module(X), eps=1e-6))
    search = search_of(net, soup=soup).fit(zoo.X, zoo.y > 0)
    plain = net_of(
        one_logit(nn.Identity()), NeuralNetBinaryClassifier, criterion=nn.BCEWithLogitsLoss
    )
    expected = search_of(plain).fit(zoo.X, zoo.y > 0)
    np.testing.assert_allclose(
        search.predict_proba(zoo.X), expected.predict_proba(zoo.X), atol=1e-5
    )
    softmax = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    soup = GreedySoup(forward=lambda module, X: module(X).clamp_min(1e-12).log())
    search = search_of(net_of(softmax, criterion=nn.NLLLoss), soup=soup).fit(zoo.X, zoo.y)
    module = search.soup_.module_
    np.testing.assert_allclose(
        search.predict_proba(zoo.X), module(torch.as_tensor(zoo.X)).detach(), atol=1e-5
    )


def test_fitted_nets_that_return_probabilities_are_warned_of(zoo: Zoo):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    nets = [net_of(start, criterion=nn.NLLLoss, lr=lr).fit(zoo.X, zoo.y) for lr in (0.01, 0.02)]
    with pytest.warns(SoupWarning, match="ends in a softmax"):
        BestCheckpoint().fit(nets, zoo.X, zoo.y)


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


class WeightedNet(NeuralNetClassifier):
    """A net whose training takes weights of rows, which it notes."""

    def partial_fit(self, X, y=None, classes=None, sample_weight=None, **fit_params):
        self.weight_ = sample_weight
        return super().partial_fit(X, y, classes, **fit_params)


@pytest.mark.parametrize("kind", [NeuralNetClassifier, WeightedNet])
def test_weights_of_rows_are_of_the_scores_the_soup_and_the_training_if_it_takes_them(
    zoo: Zoo, kind
):
    given = []

    class Scorer:
        def __call__(self, net, X, y, sample_weight=None):
            given.append((getattr(net, "weight_", None), sample_weight))
            return net.score(X, y, sample_weight=sample_weight)

    weight = np.arange(60.0) % 4
    first = [(np.arange(40), np.arange(40, 60))]
    settings = {"cv": first, "soup": MEHLSoup(max_epochs=1, random_state=0), "n_iter": 2}
    search = search_of(net_of(kind=kind), scoring=Scorer(), **settings)
    search.fit(zoo.X, zoo.y, sample_weight=weight)
    for in_training, in_score in given:
        assert np.array_equal(in_score, weight[40:])
        if kind is WeightedNet:
            assert np.array_equal(in_training, weight[:40])
    soup = MEHLSoup(max_epochs=1, random_state=0)
    soup.fit(search.checkpoints_, zoo.X[40:], zoo.y[40:], sample_weight=weight[40:])
    assert np.array_equal(search.soup_.coef_, soup.coef_)
    unweighted = soup.fit(search.checkpoints_, zoo.X[40:], zoo.y[40:])
    assert not np.array_equal(search.soup_.coef_, unweighted.coef_)
    score = search.score(zoo.X, zoo.y, sample_weight=weight)
    assert score == search.soup_.score(zoo.X, zoo.y, weight) != search.score(zoo.X, zoo.y)


def test_weights_of_rows_are_routed(zoo: Zoo):
    weight = np.arange(60.0) % 2
    with sklearn.config_context(enable_metadata_routing=True):
        search = search_of(n_iter=2, soup=MEHLSoup(max_epochs=1, random_state=0))
        search.set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        pipe = make_pipeline(FunctionTransformer(), search)
        pipe.fit(zoo.X, zoo.y, sample_weight=weight)
        scores = cross_validate(search, zoo.X, zoo.y, cv=2, params={"sample_weight": weight})
    assert np.isfinite(scores["test_score"]).all()
    plain = clone(search).fit(zoo.X, zoo.y, sample_weight=weight)
    assert np.array_equal(pipe[1].soup_.coef_, plain.soup_.coef_)


def test_groups_are_kept_in_one_part(zoo: Zoo):
    groups = np.arange(60) // 6
    cv = GroupShuffleSplit(n_splits=1, test_size=0.3, random_state=0)
    search = search_of(cv=cv, n_iter=2).fit(zoo.X, zoo.y, groups=groups)
    parts = list(cv.split(zoo.X, zoo.y, groups))
    plain = search_of(cv=parts, n_iter=2).fit(zoo.X, zoo.y)
    assert search.checkpoints_.scores == plain.checkpoints_.scores
    with pytest.raises(ValueError, match="'groups' parameter should not be None"):
        search_of(cv=cv, n_iter=2).fit(zoo.X, zoo.y)


@pytest.mark.parametrize("labels", [np.float32, np.int64, bool, str])
@pytest.mark.parametrize("scoring", [None, "roc_auc"])
def test_a_net_with_one_logit(zoo: Zoo, labels, scoring):
    torch.manual_seed(0)
    net = NeuralNetBinaryClassifier(
        nn.Linear(4, 1), max_epochs=50, lr=0.5, train_split=None, verbose=0
    )
    y = (zoo.X[:, 0] > 0).astype(np.int64)
    own = np.array(["no", "yes"])[y] if labels is str else y.astype(labels)
    search = SoupSearchCV(net, {"lr": [0.3, 0.5]}, n_iter=2, random_state=0, scoring=scoring)
    search.fit(zoo.X, own)
    assert search.score(zoo.X, own) > 0.9
    assert set(search.predict(zoo.X)) == set(own)
    assert search.cv_results_["error"] == [None] * 2


def test_a_score_without_weights_is_refused_before_training(zoo: Zoo):
    def scoring(net, X, y):
        raise AssertionError("scored")

    with pytest.raises(TypeError, match=r"scoring=<function .* has no such parameter.*omit"):
        search_of(scoring=scoring).fit(zoo.X, zoo.y, sample_weight=np.ones(60))


def test_a_network_with_a_function_of_its_own_is_trained(zoo: Zoo):
    """scikit-learn's clone copies no functions: once, no candidate was trained."""
    plain = search_of(net_of(PlainNet())).fit(zoo.X, zoo.y)
    module = PlainNet()
    module.load_state_dict(dict(plain.estimator.module.state_dict()))
    call = module.forward
    module.forward = lambda x: call(x)
    search = search_of(net_of(module)).fit(zoo.X, zoo.y)
    assert same_soup(search, plain)
    assert search.best_score_ == plain.best_score_


def test_weights_are_part_of_what_a_folder_holds(zoo: Zoo, tmp_path):
    search_of(save_dir=tmp_path, n_iter=1).fit(zoo.X, zoo.y, sample_weight=np.arange(60.0))
    with pytest.raises(CheckpointError, match="data differ"):
        search_of(save_dir=tmp_path, n_iter=1).fit(zoo.X, zoo.y)


def test_a_pipeline_is_refused_and_may_hold_the_search(zoo: Zoo):
    pipe = make_pipeline(StandardScaler(), net_of())
    params = {"neuralnetclassifier__lr": [0.1]}
    with pytest.raises(TypeError, match=r"is a Pipeline.*make_pipeline\(scaler, SoupSearchCV"):
        SoupSearchCV(pipe, params, n_iter=1).fit(zoo.X, zoo.y)
    around = make_pipeline(StandardScaler(), search_of(n_iter=2)).fit(zoo.X, zoo.y)
    assert around.score(zoo.X, zoo.y) > 0


def test_feature_names_are_those_of_the_user(zoo: Zoo):
    frame = pd.DataFrame(zoo.X, columns=list("abcd"))
    search = search_of(n_iter=2).fit(frame, zoo.y)
    assert search.feature_names_in_.tolist() == list("abcd")
    assert (search.predict(frame) == search_of(n_iter=2).fit(zoo.X, zoo.y).predict(zoo.X)).all()
    search.predict_proba(frame)
    search.score(frame, zoo.y)
    with pytest.raises(ValueError, match="feature names"):
        search.predict(frame[list("dcba")])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        search.predict(zoo.X)


def test_what_predicts_has_the_name_of_scikit_learn(zoo: Zoo, capsys):
    search = search_of(n_iter=2, verbose=1)
    with pytest.raises(NotFittedError):
        search.best_estimator_  # noqa: B018
    search.fit(zoo.X, zoo.y)
    assert search.best_estimator_ is search.soup_
    captured = capsys.readouterr()
    assert "2 out of   2" in captured.out + captured.err


def test_parameters_of_the_soup_are_checked_before_training(zoo: Zoo):
    class Stop(Callback):
        def on_train_begin(self, *args, **kwargs):
            raise RuntimeError("trained")

    search = search_of(net_of(callbacks=[("stop", Stop())]), soup=MEHLSoup(layerwise="no"))
    with pytest.raises(TypeError, match="layerwise must be True, False"):
        search.fit(zoo.X, zoo.y)


class OfACopy(PlainNet):
    table = PlainNet().state_dict()

    def __init__(self):
        super().__init__()
        for name, parameter in self.named_parameters():
            parameter.data = self.table[name].clone()


class OfATable(PlainNet):
    """All networks have the same memory, such as with nn.Embedding.from_pretrained."""

    table = copy.deepcopy(OfACopy.table)

    def __init__(self):
        super().__init__()
        for name, parameter in self.named_parameters():
            parameter.data = self.table[name]


def test_candidates_of_a_network_with_a_table_start_from_the_table(zoo: Zoo):
    """Once, the second one started from what the first one had learned."""
    searches = []
    for kind in (OfACopy, OfATable):
        net = NeuralNetClassifier(
            kind, criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0, train_split=None
        )
        with pytest.warns(SoupWarning, match="is not an instance"):
            searches.append(search_of(net).fit(zoo.X, zoo.y))
    assert same_soup(*searches)
    plain, found = (search.cv_results_["mean_test_score"] for search in searches)
    assert np.array_equal(plain, found)
