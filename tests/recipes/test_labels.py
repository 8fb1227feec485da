"""Labels in any order of the outputs: scikit-learn's scores and tools work with sorted ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import average_precision_score, f1_score, get_scorer, roc_auc_score
from sklearn.model_selection import cross_val_predict, cross_val_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    MEHLSoup,
    SoupWarning,
    UniformSoup,
)
from sksoup.inspection import (
    LossBarrierDisplay,
    compare_soups,
    ingredient_importance,
    loss_barrier,
)

LABELS = [
    ["spam", "ham"], ["ham", "spam"], [1, 0], [7, -3], [True, False],
    ["sadness", "joy", "anger"], ["a", "b", "c"], [2, 0, 1], [30, 20, 10], [3, 1, 2],
]  # fmt: skip


class Linear(nn.Module):
    """A linear network; a config names its outputs if names are given."""

    def __init__(self, n_outputs, names=None):
        super().__init__()
        self.linear = nn.Linear(5, n_outputs)
        if names is not None:
            self.config = SimpleNamespace(id2label=dict(enumerate(names)))

    def forward(self, X):
        return self.linear(X)


def linear_zoo(n_outputs, names=None, order=None):
    """Three networks, rows, and the index of the right output of each; the second is the best.

    The outputs are in another ``order`` if one is given.
    """
    rng = np.random.default_rng(4)
    X = 0.4 * rng.normal(size=(90, 5)).astype(np.float32)  # no probability rounds to 1
    W = rng.normal(size=(n_outputs, 5))
    right = (X @ W.T + 0.4 * rng.normal(size=(90, n_outputs))).argmax(axis=1)
    order = np.arange(n_outputs) if order is None else np.asarray(order)
    nets = {}
    for name, spread in [("low", 3.0), ("best", 0.2), ("middle", 1.0)]:
        weights = W + spread * rng.normal(size=W.shape)
        nets[name] = net = Linear(n_outputs, names)
        with torch.no_grad():
            net.linear.weight.copy_(torch.as_tensor(weights[order]))
            net.linear.bias.zero_()
    return CheckpointCollection(nets, module=nets["low"]), X, np.argsort(order)[right]


def by_hand(weights, X, index, labels):
    """Scores from the softmax of each output, without scikit-learn's idea of columns."""
    net = Linear(len(labels))
    net.load_state_dict(weights)
    with torch.no_grad():
        p = net(torch.as_tensor(X)).softmax(dim=1).double().numpy()
    own = p[np.arange(len(X)), index]
    found = {"neg_log_loss": np.log(own).mean()}
    if len(labels) == 2:
        positive = int(np.argmax(labels))  # the greater label, for scikit-learn
        found["roc_auc"] = roc_auc_score(index == positive, p[:, positive])
        if 1 in labels:  # scikit-learn's scorer needs this label
            found["average_precision"] = average_precision_score(index == positive, p[:, positive])
        return found
    each = [index == k for k in range(len(labels))]
    found["roc_auc_ovr"] = np.mean([roc_auc_score(is_k, p[:, k]) for k, is_k in enumerate(each)])
    found["average_precision"] = np.mean(
        [average_precision_score(is_k, p[:, k]) for k, is_k in enumerate(each)]
    )
    found["top_k_accuracy"] = (p.argsort(axis=1)[:, -2:] == index[:, None]).any(axis=1).mean()
    return found


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_scores_of_probabilities_are_those_of_each_label(labels):
    collection, X, index = linear_zoo(len(labels))
    y = np.array(labels)[index]
    expected = {name: by_hand(collection[name], X, index, labels) for name in collection}
    for metric in expected["best"]:
        best = BestCheckpoint(classes=labels, scoring=metric).fit(collection, X, y)
        known = {name: found[metric] for name, found in expected.items()}
        assert best.individual_scores_ == pytest.approx(known, abs=1e-5)
        assert best.ingredients_ == ("best",)
        assert get_scorer(metric)(best, X, y) == pytest.approx(known["best"], abs=1e-5)
        greedy = GreedySoup(classes=labels, scoring=metric).fit(collection, X, y)
        assert get_scorer(metric)(greedy, X, y) >= known["best"] - 1e-6
    assert best.classes_.tolist() == sorted(labels)
    assert list(best.recipe_.classes) == labels
    assert (best.classes_[best.predict_proba(X).argmax(axis=1)] == best.predict(X)).all()


def test_names_in_a_config_need_not_be_sorted():
    names = ["spam", "ham"]
    collection, X, index = linear_zoo(2, names)
    best = BestCheckpoint(scoring="roc_auc").fit(collection, X, np.array(names)[index])
    expected = by_hand(collection["best"], X, index, names)["roc_auc"]
    assert best.individual_scores_["best"] == pytest.approx(expected)
    assert best.ingredients_ == ("best",)
    assert best.classes_.tolist() == ["ham", "spam"]


METRICS = ("accuracy", "neg_log_loss", "roc_auc_ovr", "top_k_accuracy", "f1_macro")


@settings(max_examples=15)
@given(
    order=st.permutations(range(4)),
    labels=st.sampled_from([(10, 11, 12, 13), ("d", "a", "c", "b"), (3, 2, 0, 1)]),
    metric=st.sampled_from(METRICS),
    recipe=st.sampled_from([GreedySoup, BestCheckpoint, UniformSoup, CheckpointEnsemble]),
)
def test_no_score_depends_on_the_order_of_the_outputs(order, labels, metric, recipe):
    """The label of output i of the plain networks is labels[i], wherever it is."""
    scores, probabilities = [], []
    for places in (range(4), order):
        collection, X, index = linear_zoo(4, order=places)
        classes = np.array(labels)[list(places)]
        y = classes[index]
        params = {"scoring": metric} if recipe in (GreedySoup, BestCheckpoint) else {}
        soup = recipe(classes=classes, **params).fit(collection, X, y)
        scores.append([
            get_scorer(metric)(soup, X, y), soup.score(X, y), soup.mean_log_likelihood(X, y),
            *getattr(soup, "individual_scores_", {}).values(),
        ])  # fmt: skip
        probabilities.append(soup.predict_proba(X))
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    np.testing.assert_allclose(probabilities[0], probabilities[1], atol=1e-6)


def test_one_logit_and_several_positions_are_sorted_too():
    X = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(3.0), net.bias.zero_()
    y = np.where(X[:, 0] > 0, "ham", "spam")  # the logit is that of "ham", the second label
    soup = UniformSoup(classes=["spam", "ham"]).fit(CheckpointCollection([net, net]), X, y)
    assert soup.classes_.tolist() == ["ham", "spam"]
    np.testing.assert_allclose(soup.predict_proba(X)[:, :1], 1 / (1 + np.exp(-3 * X)), atol=1e-6)
    assert get_scorer("roc_auc")(soup, X, y) == 1.0
    pixels = nn.Conv1d(1, 3, 1)
    rows, labels = np.ones((4, 1, 5), dtype=np.float32), np.array([[2, 0, 1, 2, 0]] * 4)
    dense = UniformSoup(classes=[2, 0, 1]).fit(CheckpointCollection([pixels] * 2), rows, labels)
    p = dense.predict_proba(rows)
    with torch.no_grad():
        expected = dense.module_(torch.as_tensor(rows)).softmax(dim=1).numpy()
    np.testing.assert_allclose(p, expected[:, [1, 2, 0]])


class Squeezed(nn.Module):
    """Removes every axis of length 1, also that of a single row."""

    def __init__(self, n_outputs, squeeze=torch.squeeze):
        super().__init__()
        self.layer, self.squeeze = nn.Linear(4, n_outputs), squeeze

    def forward(self, x):
        return self.squeeze(self.layer(x))


@pytest.mark.parametrize(
    ("task", "n_outputs"), [("regression", 1), ("classification", 1), ("classification", 3)]
)
@pytest.mark.parametrize("recipe", [GreedySoup(), MEHLSoup(max_epochs=2, lr=0.1, random_state=0)])
def test_modules_that_squeeze_their_outputs(task, n_outputs, recipe):
    torch.manual_seed(0)  # for some seeds no row has the label 0
    start, *nets = (Squeezed(n_outputs) for _ in range(4))
    for net in nets:
        net.load_state_dict(
            {name: w + 0.3 * torch.randn_like(w) for name, w in start.state_dict().items()}
        )
    X = torch.randn(33, 4)  # batches of 8 leave one row
    z = start.layer(X).detach() + 0.1
    y = z[:, 0] if task == "regression" else z.argmax(1) if n_outputs > 1 else (z[:, 0] > 0).long()
    soups = []
    for squeeze in (torch.squeeze, lambda z: z.squeeze(-1) if n_outputs == 1 else z):
        ckpts = CheckpointCollection(nets, module=lambda: Squeezed(n_outputs, squeeze))  # noqa: B023
        soups.append(clone(recipe).set_params(task=task, batch_size=8).fit(ckpts, X, y.numpy()))
    ours, theirs = soups
    assert np.array_equal(ours.coef_, theirs.coef_)
    assert ours.score(X, y.numpy()) == theirs.score(X, y.numpy())
    assert np.array_equal(ours.predict(X[:1]), theirs.predict(X)[:1])


@pytest.mark.parametrize("labels", [["spam", "ham"], ["sadness", "joy", "anger"]], ids=str)
@pytest.mark.parametrize("method", ["sigmoid", "isotonic", "temperature"])
def test_calibration(labels, method):
    collection, X, index = linear_zoo(len(labels))
    y = np.array(labels)[index]
    soup = UniformSoup(classes=labels).fit(collection, X, y)
    calibrated = CalibratedClassifierCV(FrozenEstimator(soup), method=method).fit(X, y)
    assert calibrated.score(X, y) >= soup.score(X, y) - 0.05
    if method == "temperature":
        assert (calibrated.predict(X) == soup.predict(X)).all()


def test_a_fitted_soup_in_a_vote():
    names = ["spam", "ham"]
    collection, X, index = linear_zoo(2, names)
    y = np.array(names)[index]
    soup = BestCheckpoint().fit(collection, X, y)
    vote = VotingClassifier([("soup", FrozenEstimator(soup))], voting="soft").fit(X, y)
    assert (vote.predict(X) == soup.predict(X)).all()
    fresh = BestCheckpoint(collection)
    by_number = cross_val_predict(fresh, X, index, cv=3, method="predict_proba")
    np.testing.assert_allclose(by_number[:, ::-1], soup.predict_proba(X), atol=1e-6)


def log_likelihood(soup, X, y):
    """From the columns of the probabilities, which are sorted labels."""
    own = soup.predict_proba(X)[np.arange(len(y)), np.searchsorted(soup.classes_, y)]
    return float(np.log(own).mean())


@pytest.mark.parametrize("recipe", [UniformSoup, CheckpointEnsemble])
def test_the_log_loss_is_the_mean_log_likelihood(recipe):
    labels = ["sadness", "joy", "anger"]
    collection, X, index = linear_zoo(3)
    y = np.array(labels)[index]
    recipes = {"soup": recipe(classes=labels), "best": BestCheckpoint(classes=labels)}
    found = compare_soups(
        collection, X, y, X, y, recipes=recipes, scoring="neg_log_loss", measure_memory=False
    )
    for result in found.results:
        soup = found.soups[result.system]
        expected = soup.mean_log_likelihood(X, y)
        assert expected == pytest.approx(log_likelihood(soup, X, y))
        assert result.test == pytest.approx(expected)
        assert result.held_out == pytest.approx(expected)
    if recipe is UniformSoup:
        importance = ingredient_importance(found.soups["soup"], X, y, scoring="neg_log_loss")
        assert importance.score == pytest.approx(log_likelihood(found.soups["soup"], X, y))


def test_the_log_loss_of_rows_that_lack_a_class():
    labels = ["sadness", "joy", "anger"]
    collection, X, index = linear_zoo(3)
    some = index != 0
    y = np.array(labels)[index]
    best = BestCheckpoint(classes=labels, scoring="neg_log_loss").fit(collection, X[some], y[some])
    assert max(best.individual_scores_.values()) == pytest.approx(
        log_likelihood(best, X[some], y[some])
    )
    compared = compare_soups(
        collection, X, y, X[some], y[some], recipes={"best": BestCheckpoint(classes=labels)},
        scoring="neg_log_loss", measure_memory=False,
    )  # fmt: skip
    expected = log_likelihood(compared.soups["best"], X[some], y[some])
    assert compared.results[0].test == pytest.approx(expected)


def test_lines_between_checkpoints_have_the_order_of_the_outputs():
    labels = ["sadness", "joy", "anger"]
    collection, X, index = linear_zoo(3)
    y = np.array(labels)[index]
    soup = UniformSoup(classes=labels).fit(collection, X, y)
    shown = LossBarrierDisplay.from_estimator(soup, X, y).barrier
    np.testing.assert_allclose(shown.losses, loss_barrier(collection, X, y, classes=labels).losses)


# ------------------------------------------------------------------ several labels per row


@pytest.mark.parametrize("n_labels", [1, 2, 3])
def test_scikit_learns_scorers_of_several_labels(n_labels):
    collection, X, _ = linear_zoo(n_labels)
    rng = np.random.default_rng(0)
    truth = X @ collection["best"]["linear.weight"].numpy().T + 0.4 * rng.normal(
        size=(90, n_labels)
    )
    y = (truth > 0).astype(int)
    expected = {}
    for name in collection:
        logits = X @ collection[name]["linear.weight"].numpy().T
        columns = [(y[:, k], logits[:, k]) for k in range(n_labels)]
        expected[name] = {
            "f1_micro": f1_score(y.ravel(), (logits > 0).ravel(), average=None)[1]
            if n_labels > 1 else np.mean((logits > 0) == y),
            "roc_auc": np.mean([roc_auc_score(*column) for column in columns]),
            "average_precision": np.mean([average_precision_score(*column) for column in columns]),
            "accuracy": ((logits > 0) == y).all(axis=1).mean(),
        }  # fmt: skip
    for metric in expected["best"]:
        best = BestCheckpoint(task="multilabel", scoring=metric).fit(collection, X, y)
        known = {name: found[metric] for name, found in expected.items()}
        assert best.individual_scores_ == pytest.approx(known, abs=1e-6)
        if n_labels == 2:
            compared = compare_soups(
                collection, X, y, X, y, recipes={"best": clone(best)}, scoring=metric,
                measure_memory=False,
            )  # fmt: skip
            assert compared.results[0].test == pytest.approx(max(known.values()), abs=1e-6)
        scores = cross_val_score(UniformSoup(collection, task="multilabel"), X, y, scoring=metric)
        assert np.isfinite(scores).all()
    assert [labels.tolist() for labels in best.classes_] == [[0, 1]] * n_labels


# ------------------------------------------------------- labels that are not those of the outputs


@pytest.mark.parametrize(
    ("classes", "other"),
    [
        (["cat", "dog", "fox"], "Dog"), (["fox", "cat", "dog"], "zebra"), ([0, 1, 3], 2),
        ([3, 1, 0], 9), (["cat", "dog", "fox"], 1), ([2, 0, 1], "1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [None, object])
def test_the_likelihood_of_a_label_that_is_no_class(classes, other, kind):
    collection, X, index = linear_zoo(3)
    y = np.array(classes)[index]
    soup = UniformSoup(classes=classes).fit(collection, X, y)
    others = np.array([other] * 90, dtype=kind)
    with pytest.raises(ValueError, match=f"not classes of the soup: {other!r}"):
        soup.mean_log_likelihood(X, others)
    mixed = y.astype(object)
    mixed[[3, 50]] = other
    with pytest.raises(ValueError, match=f"not classes of the soup: {other!r}"):
        soup.mean_log_likelihood(X, mixed)


@pytest.mark.parametrize("as_batches", [False, True])
@pytest.mark.parametrize("batch_size", [7, 128])
def test_the_likelihood_of_too_many_or_too_few_labels_and_weights(as_batches, batch_size):
    collection, X, y = linear_zoo(3)
    soup = UniformSoup(batch_size=batch_size).fit(collection, X, y)
    rows = DataLoader(TensorDataset(torch.as_tensor(X)), batch_size=13) if as_batches else X
    for labels in (y[:-1], np.append(y, 0)):
        with pytest.raises(ValueError, match=f"y has {len(labels)} entries, .*one per row"):
            soup.mean_log_likelihood(rows, labels)
    for n in (89, 91):
        with pytest.raises(ValueError, match=f"sample_weight has {n} entries, .*one per row"):
            soup.mean_log_likelihood(rows, y, np.ones(n))
    expected = soup.mean_log_likelihood(X, y)
    assert soup.mean_log_likelihood(rows, y, np.ones(90)) == pytest.approx(expected)


def test_labels_without_0_may_begin_at_1():
    collection, X, index = linear_zoo(4)
    some = index != 3
    y = index[some] + 1  # 1, 2, 3 of 1 to 4
    with pytest.warns(SoupWarning, match=r"but no 0\..*range\(4\), or classes=range\(1, 5\)"):
        soup = UniformSoup().fit(collection, X[some], y)
    assert soup.classes_.tolist() == [0, 1, 2, 3]
    assert any("but no 0" in said for said in soup.warnings_)
    right = UniformSoup(classes=range(1, 5)).fit(collection, X[some], y)
    assert right.score(X[some], y) > 0.5
    UniformSoup(classes=range(4)).fit(collection, X[some], y)  # without a warning
    UniformSoup().fit(collection, X, index + 1)
    UniformSoup().fit(collection, X[index > 1], np.where(index == 2, 2, 0)[index > 1])


def test_labels_that_are_names_and_could_be_indices_are_warned_of():
    net = Linear(5, [str(k + 1) for k in range(5)])
    ckpts = CheckpointCollection([net, net], module=lambda: net)
    X = torch.randn(8, next(net.parameters()).shape[1])
    with pytest.warns(SoupWarning, match=r"could also be indices .* classes=\[1, 2, 3, 4, 5\], or"):
        soup = UniformSoup().fit(ckpts, X, [1, 2, 3, 4] * 2)
    assert soup.classes_.tolist() == [1, 2, 3, 4, 5]
    UniformSoup().fit(ckpts, X, [1, 2, 3, 5] * 2)  # these are no indices
    for classes in (range(5), range(1, 6)):
        soup = UniformSoup(classes=classes).fit(ckpts, X, [1, 2, 3, 4] * 2)
        assert soup.classes_.tolist() == [*classes]


def test_a_missing_0_among_many_missing_labels_is_no_warning():
    collection, X, index = linear_zoo(4)
    UniformSoup().fit(collection, X[index > 1], index[index > 1])  # 0 and 1 are missing


def test_the_log_loss_of_several_labels_is_refused():
    X, y = torch.randn(20, 3), np.arange(40).reshape(20, 2) % 2
    nets = [torch.nn.Linear(3, 2) for _ in range(2)]
    soup = GreedySoup(task="multilabel", scoring="neg_log_loss")
    with pytest.raises(ValueError, match=r"ignores the labels that are absent.*average_precision"):
        soup.fit(nets, X, y)


NAMES = ["1", "2", "unknown"]


def test_integers_that_are_names_of_some_outputs_are_refused():
    nets, X, right = linear_zoo(3, NAMES)
    rows = right < 2  # "unknown" has no example
    y = right[rows] + 1
    checkpoints = CheckpointCollection(nets, module=lambda: Linear(3, NAMES))
    with pytest.raises(ValueError, match=r"names of the module's outputs, but could also be"):
        UniformSoup().fit(checkpoints, X[rows], y)
    soup = UniformSoup().fit(checkpoints, X[rows], y.astype(str))
    assert soup.score(X[rows], y.astype(str)) > 0.5
    UniformSoup(classes=[1, 2, 3]).fit(checkpoints, X[rows], y)


def test_labels_from_one_are_warned_of_also_if_outputs_have_names():
    names = [f"{k} stars" for k in range(1, 4)]
    nets, X, right = linear_zoo(3, names)
    rows = right < 2
    checkpoints = CheckpointCollection(nets, module=lambda: Linear(3, names))
    with pytest.warns(SoupWarning, match=r"y holds integers below 3, .* but no 0"):
        UniformSoup().fit(checkpoints, X[rows], right[rows] + 1)
