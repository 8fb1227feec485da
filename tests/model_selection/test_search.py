"""Fine-tune and soup in one estimator; keeping the candidates of scikit-learn's searches."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.base import BaseEstimator, ClassifierMixin, clone, is_classifier, is_regressor
from sklearn.exceptions import FitFailedWarning, NotFittedError
from sklearn.model_selection import KFold, RandomizedSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, GreedySoup, MEHLSoup, SoupWarning
from sksoup.model_selection import CheckpointScorer, SoupSearchCV

from ..zoo import PlainNet, Zoo, same_tensors

LR = {"lr": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]}


def net_of(module=None, kind=NeuralNetClassifier, **kwargs):
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = PlainNet()
    settings = {"criterion": nn.CrossEntropyLoss, "max_epochs": 2, "verbose": 0,
                "train_split": None, **kwargs}  # fmt: skip
    return kind(module, **settings)


def search_of(net=None, **kwargs):
    settings = {"n_iter": 4, "random_state": 0, **kwargs}
    return SoupSearchCV(net or net_of(), settings.pop("param_distributions", LR), **settings)


def same_soup(a, b):
    """Files keep their tensors in order of name."""
    a, b = (dict(sorted(search.soup_.state_dict().items())) for search in (a, b))
    return same_tensors(a, b)


def unrelated(collection):
    collection.check()
    return collection.strangers(collection.names)


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


def test_known_scores_rank_for_greedy(zoo: Zoo):
    search = search_of().fit(zoo.X, zoo.y)
    assert search.soup_.individual_scores_ == dict(search.checkpoints_.scores)
    other = search_of(soup=GreedySoup(scoring="neg_log_loss")).fit(zoo.X, zoo.y)
    assert other.checkpoints_.scores is None


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
    with pytest.warns(SoupWarning, match=r"not an instance.*random start is drawn and shared"):
        search = search_of(net_of(PlainNet)).fit(zoo.X, zoo.y)
    assert unrelated(search.checkpoints_) == []


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


def test_a_fitted_net_is_the_start(zoo: Zoo):
    net = net_of(PlainNet, max_epochs=20).fit(zoo.X, zoo.y)
    start = {name: w.clone() for name, w in net.module_.state_dict().items()}
    search = search_of(net, param_distributions={"lr": [0.0]}, n_iter=1).fit(zoo.X, zoo.y)
    assert same_tensors(search.checkpoints_["candidate000"], start)


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


# ----------------------------------------------------------------------------- failures


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


class ScratchNet(ClassifierMixin, BaseEstimator):
    """Anything with ``module_``: trains a module it may or may not initialise anew."""

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
    with pytest.raises(ValueError, match=r"do not share a start.*ScratchNet"):
        search_of(ScratchNet(start, fresh=True)).fit(X, y)
    search_of(ScratchNet(start), save_dir=tmp_path).fit(X, y)
    with pytest.raises(ValueError, match="does not tell their architecture"):
        search_of(ScratchNet(start), save_dir=tmp_path).fit(X, y)


# --------------------------------------------------------------------------- on disk


def test_candidates_are_written_and_a_search_goes_on(tmp_path, zoo: Zoo):
    plain = search_of().fit(zoo.X, zoo.y)
    search = search_of(save_dir=tmp_path / "runs").fit(zoo.X, zoo.y)
    assert same_soup(search, plain)
    files = sorted((tmp_path / "runs").glob("*.safetensors"))
    assert search.checkpoints_.path("candidate003") == files[3]
    files[1].unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    again = search_of(save_dir=tmp_path / "runs").fit(zoo.X, zoo.y)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # kept, not trained again
    assert same_soup(again, plain)
    assert again.best_score_ == search.best_score_


def test_without_a_seed_a_search_goes_on_with_the_seed_it_began_with(tmp_path, zoo: Zoo):
    first = search_of(save_dir=tmp_path, random_state=None).fit(zoo.X, zoo.y)
    again = search_of(save_dir=tmp_path, random_state=None).fit(zoo.X, zoo.y)
    assert again.cv_results_["params"] == first.cv_results_["params"]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"random_state": 1}, "seed"),
        ({"n_iter": 3}, "candidates"),
        ({"net": net_of(max_epochs=3)}, "params"),
        ({"net": net_of(PlainNet())}, "start"),
        ({"scoring": "neg_log_loss"}, "scoring"),
    ],
)
def test_another_search_is_refused(tmp_path, zoo: Zoo, changed, what):
    search_of(save_dir=tmp_path).fit(zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match=f"holds another search: .*{what}"):
        search_of(save_dir=tmp_path, **changed).fit(zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match="data differ"):
        search_of(save_dir=tmp_path).fit(zoo.X + 1, zoo.y)


def test_checkpoints_of_unknown_origin_are_refused(tmp_path, zoo: Zoo):
    zoo.checkpoints.save(tmp_path)
    with pytest.raises(CheckpointError, match="unknown origin"):
        search_of(save_dir=tmp_path).fit(zoo.X, zoo.y)


def test_a_killed_search_continues(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys
        import numpy as np, torch
        from skorch import NeuralNetClassifier
        from sksoup.model_selection import SoupSearchCV

        class Kill:
            seen = 0
            def __call__(self, net, X, y):
                Kill.seen += 1
                if Kill.seen == 3 and sys.argv[2] == "kill":
                    os._exit(9)
                return 0.5

        rng = np.random.default_rng(0)
        X = rng.normal(size=(60, 4)).astype(np.float32)
        y = (X[:, 0] > 0).astype(int)
        torch.manual_seed(0)
        net = NeuralNetClassifier(torch.nn.Linear(4, 2), criterion=torch.nn.CrossEntropyLoss,
                                  verbose=0, train_split=None, max_epochs=2)
        search = SoupSearchCV(net, {"lr": [0.1, 0.2, 0.3, 0.4, 0.5]}, n_iter=5, random_state=0,
                              scoring=Kill(), save_dir=sys.argv[1])
        search.fit(X, y)
        print(Kill.seen, search.soup_.state_dict()["bias"].tolist())
        """
    )

    def run(folder, mode):
        return subprocess.run(
            [sys.executable, "-c", script, str(folder), mode],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run(tmp_path / "a", "kill").returncode == 9
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 2
    resumed, whole = run(tmp_path / "a", "go"), run(tmp_path / "b", "go")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    n_trained, weights = resumed.stdout.split(" ", 1)
    assert (n_trained, weights) == ("3", whole.stdout.split(" ", 1)[1])


# --------------------------------------------------------------------- CheckpointScorer


def test_an_unmodified_random_search_keeps_every_candidate(tmp_path, zoo: Zoo):
    module = PlainNet()
    module.drop = nn.Identity()
    scorer = CheckpointScorer(tmp_path / "runs", scoring="accuracy")
    settings = {"n_iter": 3, "cv": 2, "random_state": 0}
    search = RandomizedSearchCV(net_of(module), LR, scoring=scorer, **settings)
    search.fit(zoo.X, zoo.y)
    collection = scorer.checkpoints(module=PlainNet)
    assert len(collection) == 6  # candidates times splits; the refitted best is not scored
    plain = RandomizedSearchCV(net_of(module), LR, scoring="accuracy", **settings)
    plain.fit(zoo.X, zoo.y)
    assert (search.cv_results_["mean_test_score"] == plain.cv_results_["mean_test_score"]).all()
    assert unrelated(collection) == []
    soup = GreedySoup().fit(collection, zoo.X, zoo.y)
    assert soup.score(zoo.X, zoo.y) >= max(soup.individual_scores_.values())
    net = net_of().fit(zoo.X, zoo.y)
    assert scorer(net, zoo.X, zoo.y) == scorer(net, zoo.X, zoo.y) == net.score(zoo.X, zoo.y)
    assert len(scorer.checkpoints(module=PlainNet)) == 7  # the same weights are one file


def test_the_scorer_finds_the_net_in_a_pipeline_and_refuses_others(tmp_path, zoo: Zoo):
    scorer = CheckpointScorer(tmp_path / "runs")
    pipe = make_pipeline(FunctionTransformer(), net_of()).fit(zoo.X, zoo.y)
    assert scorer(pipe, zoo.X, zoo.y) == pipe.score(zoo.X, zoo.y)
    with pytest.raises(TypeError, match="has no module_ to keep"):
        scorer(FunctionTransformer(), zoo.X, zoo.y)
    (file,) = (tmp_path / "runs").iterdir()
    record = json.loads(safe_open(file, "pt").metadata()["sksoup.candidate"])
    assert record == {"score": pipe.score(zoo.X, zoo.y)}


def test_parameters_that_are_objects_are_known_again_by_another_process(tmp_path):
    code = """
        import sys, torch, numpy as np
        from skorch import NeuralNetClassifier
        from skorch.callbacks import LRScheduler
        from torch import nn
        from sksoup.model_selection import SoupSearchCV
        torch.manual_seed(0)
        net = NeuralNetClassifier(nn.Linear(4, 2), criterion=nn.CrossEntropyLoss, verbose=0,
                                  max_epochs=1, train_split=None)
        X = np.random.RandomState(0).normal(size=(40, 4)).astype(np.float32)
        choices = {"callbacks": [[("lr", LRScheduler(step_every="batch"))], []]}
        search = SoupSearchCV(net, choices, n_iter=2, random_state=0, save_dir=sys.argv[1])
        search.fit(X, np.arange(40) % 2)
    """
    for _ in range(2):
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], check=True)


def test_rows_on_a_device(zoo: Zoo):
    class Elsewhere(torch.Tensor):
        """What validation takes for a tensor of an accelerator."""

        device = torch.device("cuda")

    X = torch.as_tensor(zoo.X).as_subclass(Elsewhere)
    search = search_of(n_iter=2).fit(X, zoo.y)
    assert same_soup(search, search_of(n_iter=2).fit(zoo.X, zoo.y))
