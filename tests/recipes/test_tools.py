"""scikit-learn's and skorch's tools around soups."""

from __future__ import annotations

import pickle
from email.message import EmailMessage
from importlib.metadata import PackageNotFoundError

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.ensemble import VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import permutation_importance
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    TunedThresholdClassifierCV,
    cross_val_score,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_html_repr
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    UniformSoup,
)
from sksoup.model_selection import SoupSearchCV

from ..zoo import Net, PaperLearned, PaperMEHL, Zoo, make_states, same_tensors

MEHL = PaperMEHL(max_epochs=1, model_batch_size=3, random_state=0)


@pytest.fixture
def files(tmp_path, zoo: Zoo):
    return zoo.checkpoints.save(tmp_path / "zoo")


# ------------------------------------------------------------------ copies and pickles


@pytest.mark.parametrize(
    "kind", [GreedySoup, LearnedSoup, MEHLSoup, UniformSoup, CheckpointEnsemble]
)
def test_pickles_of_path_backed_soups_hold_one_model(files, zoo: Zoo, tmp_path, kind):
    soup = kind(files).fit(zoo.X, zoo.y)
    joblib.dump(soup, tmp_path / "soup.joblib")
    for again in (pickle.loads(pickle.dumps(soup)), joblib.load(tmp_path / "soup.joblib")):
        assert (again.predict_proba(zoo.X) == soup.predict_proba(zoo.X)).all()
        assert again.checkpoints_.names == soup.checkpoints_.names
    # one tiny model, and names, paths, hashes, history: nothing that grows with the weights
    assert len(pickle.dumps(soup)) < 40_000
    assert len(pickle.dumps(kind(files))) < 6_000


def test_a_pickle_of_a_large_collection_is_small(tmp_path):
    states = [{"weight": torch.randn(500, 500)} for _ in range(4)]
    collection = CheckpointCollection(states, module=Net).save(tmp_path / "large")
    assert len(pickle.dumps(MEHLSoup(collection))) < 10_000


# --------------------------------------------------------------------------- pipelines


def test_a_pipeline_with_the_frozen_scaler_of_training(files, zoo: Zoo):
    scaler = StandardScaler().fit(zoo.X * 3 + 1)  # whatever training used
    pipe = make_pipeline(FrozenEstimator(scaler), GreedySoup(files)).fit(zoo.X, zoo.y)
    soup = GreedySoup(files).fit(scaler.transform(zoo.X), zoo.y)
    assert (pipe.predict(zoo.X) == soup.predict(scaler.transform(zoo.X))).all()
    assert (pipe[0].transform(zoo.X) == scaler.transform(zoo.X)).all()  # not refitted


def test_weights_of_rows_are_routed(files, zoo: Zoo):
    weight = np.arange(60) % 2.0
    with sklearn.config_context(enable_metadata_routing=True):
        soup = clone(MEHL).set_params(checkpoints=files)
        soup.set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        pipe = make_pipeline(FrozenEstimator(StandardScaler().fit(zoo.X)), soup)
        pipe.fit(zoo.X, zoo.y, sample_weight=weight)
        plain = clone(MEHL).fit(files, pipe[0].transform(zoo.X), zoo.y, sample_weight=weight)
        assert (pipe[1].coef_ == plain.coef_).all()
        scores = cross_validate(soup, zoo.X, zoo.y, cv=2, params={"sample_weight": weight})
        assert np.isfinite(scores["test_score"]).all()
    without = clone(MEHL).fit(files, StandardScaler().fit_transform(zoo.X), zoo.y)
    assert not np.array_equal(without.coef_, plain.coef_)


def test_frames_give_feature_names(files, zoo: Zoo):
    frame = pd.DataFrame(zoo.X, columns=list("abcd"))
    soup = UniformSoup(files).fit(frame, zoo.y)
    assert soup.feature_names_in_.tolist() == list("abcd")
    plain = UniformSoup(files).fit(zoo.X, zoo.y)
    assert (soup.predict(frame) == plain.predict(zoo.X)).all()
    with pytest.raises(ValueError, match="feature names"):
        soup.predict(frame[list("dcba")])


# ----------------------------------------------------------------------------- displays


@pytest.mark.parametrize("kind", [GreedySoup, LearnedSoup, MEHLSoup, UniformSoup, SoupSearchCV])
def test_the_html_display_shows_what_parameters_mean(kind, monkeypatch):
    estimator = kind(UniformSoup(), {}) if kind is SoupSearchCV else kind()
    html = estimator_html_repr(estimator)
    for name in estimator.get_params(deep=False):
        assert name in html
    assert estimator._get_doc_link() == ""  # the package's metadata names no address yet

    def metadata(name):
        return EmailMessage() if name != "sksoup" else message

    message = EmailMessage()
    message["Project-URL"] = "Documentation, https://docs.example/sksoup/"
    monkeypatch.setattr("sksoup.recipes.base.metadata", metadata)
    module = "model_selection." if kind is SoupSearchCV else ""
    expected = f"https://docs.example/sksoup/generated/sksoup.{module}{kind.__name__}.html"
    assert estimator._get_doc_link() == expected
    html = estimator_html_repr(estimator)
    assert expected in html
    meaning = (
        "Number of candidates to sample"
        if kind is SoupSearchCV
        else "Device that the module runs on"
    )
    assert meaning in html  # descriptions are shown where there is a page to link to


def test_the_html_display_without_an_installed_package(monkeypatch):
    def metadata(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("sksoup.recipes.base.metadata", metadata)
    assert UniformSoup()._get_doc_link() == ""
    assert "UniformSoup" in UniformSoup()._repr_html_()


# ---------------------------------------------------------------------------- searches


@pytest.mark.parametrize(
    "search",
    [
        lambda soup: GridSearchCV(soup, {"layerwise": [False, True], "lr": [0.01, 0.1]}, cv=2),
        lambda soup: RandomizedSearchCV(
            soup, {"lr": [0.01, 0.1, 1]}, n_iter=2, cv=2, random_state=0
        ),
        lambda soup: HalvingGridSearchCV(  # of few rows, which may lack the label 0
            soup.set_params(classes=[0, 1, 2]), {"lr": [0.01, 0.1]}, cv=2, min_resources=20
        ),
    ],
)
def test_searches_over_parameters(files, zoo: Zoo, search):
    found = search(clone(MEHL).set_params(checkpoints=files)).fit(zoo.X, zoo.y)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    best = clone(MEHL).set_params(checkpoints=files, **found.best_params_).fit(zoo.X, zoo.y)
    assert same_tensors(found.best_estimator_.state_dict(), best.state_dict())
    assert found.best_estimator_.checkpoints is files  # never copied


def test_search_over_collections(files, zoo: Zoo):
    collections = [files, files.drop("checkpoint0"), files.select(["checkpoint1", "checkpoint2"])]
    search = GridSearchCV(UniformSoup(), {"checkpoints": collections}, cv=2).fit(zoo.X, zoo.y)
    for collection, score in zip(collections, search.cv_results_["mean_test_score"], strict=True):
        assert score == cross_val_score(UniformSoup(collection), zoo.X, zoo.y, cv=2).mean()
    assert search.best_params_["checkpoints"] in collections


class Threads(nn.CrossEntropyLoss):
    """A loss that fails unless it is computed with so many threads."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, output, y):
        if torch.get_num_threads() != self.n:
            raise AssertionError(f"{torch.get_num_threads()} threads, expected {self.n}")
        return super().forward(output, y)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_workers_get_little_and_compute_as_the_parent_does(files, zoo: Zoo, n_threads):
    soup = clone(MEHL).set_params(checkpoints=files, criterion=Threads(n_threads))
    grid = {"lr": [0.01, 0.1]}
    torch.set_num_threads(n_threads)
    try:
        soup.fit(zoo.X, zoo.y)
        alone = GridSearchCV(soup, grid, cv=2, error_score="raise").fit(zoo.X, zoo.y)
        beside = GridSearchCV(soup, grid, cv=2, n_jobs=2, error_score="raise").fit(zoo.X, zoo.y)
    finally:
        torch.set_num_threads(1)
    scores = [search.cv_results_["mean_test_score"] for search in (alone, beside)]
    assert (scores[0] == scores[1]).all()
    assert len(pickle.dumps(clone(soup))) < 10_000


def test_learning_curve_and_importance(files, zoo: Zoo):
    soup = UniformSoup(files)
    sizes, train, test = learning_curve(soup, zoo.X, zoo.y, cv=2, train_sizes=[0.5, 1.0])
    assert sizes.tolist() == [15, 30]
    assert train.shape == test.shape == (2, 2)
    importance = permutation_importance(
        soup.fit(zoo.X, zoo.y), zoo.X, zoo.y, n_repeats=2, random_state=0
    )
    assert importance.importances.shape == (4, 2)


# ------------------------------------------------------------------- around a frozen soup


def test_calibration_and_thresholds_around_a_frozen_soup(files, zoo: Zoo):
    soup = UniformSoup(files).fit(zoo.X, zoo.y)
    calibrated = CalibratedClassifierCV(FrozenEstimator(soup)).fit(zoo.X, zoo.y)
    np.testing.assert_allclose(calibrated.predict_proba(zoo.X).sum(axis=1), 1, atol=1e-6)
    assert calibrated.classes_.tolist() == [0, 1, 2]
    two = CheckpointCollection([nn.Linear(4, 2) for _ in range(2)])
    binary = UniformSoup(two).fit(zoo.X, zoo.y > 0)
    tuned = TunedThresholdClassifierCV(FrozenEstimator(binary), cv="prefit", refit=False)
    tuned.fit(zoo.X, zoo.y > 0)
    assert 0 <= tuned.best_threshold_ <= 1


def test_voting(files, zoo: Zoo):
    soups = [("uniform", UniformSoup(files)), ("mehl", clone(MEHL).set_params(checkpoints=files))]
    vote = VotingClassifier(soups, voting="soft").fit(zoo.X, zoo.y)
    mean = np.mean([soup.predict_proba(zoo.X) for soup in vote.estimators_], axis=0)
    np.testing.assert_allclose(vote.predict_proba(zoo.X), mean)


# --------------------------------------------------------------------------- callbacks


def test_progress_bar_alone_and_in_a_grid_search(files, zoo: Zoo, capsys):
    soup = clone(MEHL).set_params(checkpoints=files).set_callbacks(ProgressBar())
    soup.fit(zoo.X, zoo.y)
    assert "MEHLSoup" in capsys.readouterr().out
    search = GridSearchCV(clone(MEHL).set_params(checkpoints=files), {"lr": [0.1]}, cv=2)
    search.set_callbacks(ProgressBar()).fit(zoo.X, zoo.y)
    assert "MEHLSoup" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("soup", "n_steps"),
    [(PaperMEHL(model_batch_size=3, max_epochs=2, random_state=0), 6),
     (PaperLearned(max_epochs=3, random_state=0), 3), (GreedySoup(), 14)],
)  # fmt: skip
def test_scoring_monitor_scores_the_soup_so_far(files, zoo: Zoo, soup, n_steps):
    monitor = ScoringMonitor(scoring="accuracy")
    soup = clone(soup).set_params(checkpoints=files).set_callbacks(monitor).fit(zoo.X, zoo.y)
    scores = [entry["accuracy"] for entry in monitor.get_logs().data]
    assert len(scores) == n_steps
    assert scores[-1] == soup.score(zoo.X, zoo.y)
    if isinstance(soup, GreedySoup):  # the best so far, then what is kept
        kept = [found["score"] for found in soup.path_ if found["kept"]]
        assert scores == sorted(scores)
        assert set(scores[7:]) == set(kept)


def test_scoring_monitor_sees_weights_of_rows(files, zoo: Zoo):
    monitor = ScoringMonitor(scoring="accuracy")
    soup = PaperLearned(files, max_epochs=1, random_state=0).set_callbacks(monitor)
    weight = np.arange(60) % 2.0
    soup.fit(zoo.X, zoo.y, sample_weight=weight)
    (entry,) = monitor.get_logs().data
    assert entry["accuracy"] == soup.score(zoo.X, zoo.y, sample_weight=weight)


def test_scoring_monitor_in_a_grid_search(files, zoo: Zoo):
    monitor = ScoringMonitor(scoring="accuracy")
    soup = clone(MEHL).set_params(checkpoints=files).set_callbacks(monitor)
    GridSearchCV(soup, {"lr": [0.01, 0.1]}, cv=2).fit(zoo.X, zoo.y)
    entries = monitor.get_logs().data
    assert len(entries) == (2 * 2 + 1) * 3  # candidates, folds and the refit; model batches


# ------------------------------------------------------------------------------ skorch


def test_a_soup_goes_on_training_in_skorch(files, zoo: Zoo):
    soup = GreedySoup(files).fit(zoo.X, zoo.y)
    net = soup.to_skorch(verbose=0, train_split=None, max_epochs=3, lr=0.01)
    assert net.initialized_
    probabilities = torch.as_tensor(net.predict_proba(zoo.X))
    np.testing.assert_allclose(probabilities, soup.predict_proba(zoo.X), atol=1e-6)
    before = soup.state_dict()
    net.partial_fit(zoo.X, zoo.y)
    assert len(net.history) == 3
    assert same_tensors(soup.state_dict(), before)  # the soup is not touched
    assert not same_tensors(dict(net.module_.state_dict()), before)


def test_regression_soups_become_regressors():
    states = make_states(3, seed=0, batch_norm=False)
    collection = CheckpointCollection(states, module=lambda: Net(batch_norm=False))
    X, y = np.ones((10, 4), np.float32), np.ones((10, 3), np.float32)
    soup = UniformSoup(collection, task="regression").fit(X, y)
    net = soup.to_skorch(verbose=0)
    np.testing.assert_allclose(net.predict(X), soup.predict(X), atol=1e-6)
    soup = UniformSoup(collection, task="multilabel").fit(X, y.astype(int))
    with pytest.raises(ValueError, match="no net for task='multilabel'"):
        soup.to_skorch()


def test_soups_of_one_logit_become_binary_classifiers(zoo: Zoo):
    def build():
        return nn.Linear(4, 1)

    torch.manual_seed(0)
    nets = CheckpointCollection([build() for _ in range(3)], module=build)
    X = zoo.X.astype(np.float32)
    y = (zoo.X @ nets["checkpoint1"]["weight"].numpy()[0] > 0).astype(int)
    soup = BestCheckpoint(nets).fit(X, y)
    net = soup.to_skorch(verbose=0, max_epochs=2)
    np.testing.assert_array_equal(net.predict(X), soup.predict(X))
    assert set(soup.predict(X)) == {0, 1}
    np.testing.assert_allclose(net.predict_proba(X), soup.predict_proba(X), atol=1e-6)
    net.partial_fit(X, y)
    assert len(net.history) == 2


def test_a_forward_of_its_own_can_not_go_on_in_skorch(zoo: Zoo):
    soup = UniformSoup(forward=lambda module, X: -module(X)).fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match=r"calls module\(X\), not forward=.*skorch.NeuralNet"):
        soup.to_skorch()


# ----------------------------------------------------------------------------- logging


@pytest.mark.parametrize(
    "soup",
    [
        PaperMEHL(model_batch_size=3, max_epochs=2, model_epochs=2, batch_size=25),
        MEHLSoup(max_epochs=2, batch_size=None),
        MEHLSoup(model_batch_size=2, max_epochs=1, batch_size=8, accumulate=3),
        LearnedSoup(max_epochs=3, batch_size=25),
    ],
)
def test_the_number_of_steps_is_logged_at_the_start(zoo: Zoo, caplog, soup):
    with caplog.at_level("INFO", "sksoup"):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    (line,) = [record.getMessage() for record in caplog.records]
    factors, total = line.removeprefix(f"{type(soup).__name__}: 7 checkpoints, ").split(" = ")
    assert total == f"{sum(len(record['loss']) for record in soup.history_)} steps"
    numbers = [int(factor.split()[0]) for factor in factors.split(" x ")]
    assert int(np.prod(numbers)) == int(total.split()[0])
    if soup.accumulate == 1:
        assert soup.counts_.n_backward == int(total.split()[0])
    else:
        assert factors.endswith("3 groups of 3 minibatches")


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("soup", [BestCheckpoint(), GreedySoup(early_rejection=False)])
def test_the_number_of_evaluations_is_logged_at_the_start(zoo: Zoo, caplog, soup, known):
    scores = {name: float(k) for k, name in enumerate(zoo.checkpoints)} if known else None
    checkpoints = CheckpointCollection(zoo.checkpoints, module=Net, scores=scores)
    with caplog.at_level("INFO", "sksoup"):
        soup = clone(soup).fit(checkpoints, zoo.X, zoo.y)
    (record,) = caplog.records
    n = soup.counts_.rows_forward // 60
    if isinstance(soup, GreedySoup) and len(soup.ingredients_) > 1:
        n -= 1  # the mix is scored once more
    assert record.getMessage() == f"{type(soup).__name__}: 7 checkpoints, {n} evaluations"
