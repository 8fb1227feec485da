"""Labels that are left out: -100, and the ignore_index of the criterion."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import f1_score, jaccard_score
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    SoupWarning,
    UniformSoup,
    mix,
)
from sksoup.inspection import compare_soups
from sksoup.model_selection import SoupSearchCV
from sksoup.recipes.validation import scorer_of

from ..language import checkpoints as language_models
from ..language import texts
from ..zoo import PaperMEHL, Zoo, around

N = 4  # outputs
VOIDS = pytest.mark.parametrize("void", [255, -1, 0])


def scene(n_outputs=N):
    """Networks, images and the class of every pixel."""
    torch.manual_seed(0)
    build = partial(nn.Conv2d, 2, n_outputs, 1)
    start, X = build(), torch.randn(40, 2, 6, 6)
    with torch.no_grad():
        z = start(X)
        y = (z + 0.5 * torch.randn_like(z)).argmax(1)
    return CheckpointCollection(around(start, 4, 0.15), module=build), X.numpy(), y.numpy()


def with_void(y, void, absent=None):
    """Masks with void pixels at the border and without one class; 0 is the background."""
    y = y.copy()
    if absent is not None:
        y[y == absent] = (absent + 1) % N
    if void != 0:
        y[:, :2] = void
    return y


def ignoring(void):
    return nn.CrossEntropyLoss(ignore_index=void)


def logits_of(module, X):
    with torch.no_grad():
        return module(torch.as_tensor(X)).double()


def own_accuracy(module, X, y, void, weight):
    """Pixel by pixel."""
    predicted = logits_of(module, X).argmax(1).numpy()
    right = total = 0.0
    for place, label in np.ndenumerate(y):
        if label not in (void, -100):
            right += weight[place[0]] * (predicted[place] == label)
            total += weight[place[0]]
    return right / total


def own_loss(module, X, y, void, temperature):
    """Pixel by pixel."""
    log_p = (temperature * logits_of(module, X)).log_softmax(1).numpy()
    losses = [
        -log_p[row, label, i, j]
        for (row, i, j), label in np.ndenumerate(y)
        if label not in (void, -100)
    ]
    return np.mean(losses)


@VOIDS
@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize("classes", [None, range(N)])
@pytest.mark.parametrize("kind", [MEHLSoup, LearnedSoup])
def test_labels_that_the_criterion_ignores_are_left_out(kind, void, absent, classes):
    nets, X, y = scene()
    y = with_void(y, void, absent)
    y[0, :, 5] = -100
    weight = np.arange(40) % 4 / 2
    soup = kind(criterion=ignoring(void), classes=classes, max_epochs=1, random_state=0)
    soup.fit(nets, X, y, sample_weight=weight)
    assert soup.classes_.tolist() == list(range(N))
    assert set(np.unique(soup.predict(X)).tolist()) <= set(range(N))
    for w in (np.ones(40), weight):
        assert soup.score(X, y, w) == pytest.approx(own_accuracy(soup.module_, X, y, void, w))
    loss = own_loss(soup.module_, X, y, void, getattr(soup, "temperature_", 1.0))
    assert soup.mean_log_likelihood(X, y) == pytest.approx(-loss, abs=1e-6)
    own = own_accuracy(soup.module_, X, y, void, weight)
    assert max(soup.held_out_scores_.values()) == pytest.approx(own)
    marked = np.where(y == void, -100, y)
    plain = clone(soup).set_params(criterion=None, classes=range(N))
    plain.fit(nets, X, marked, sample_weight=weight)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert soup.held_out_scores_ == plain.held_out_scores_
    assert soup.warnings_ == plain.warnings_


@VOIDS
def test_the_loss_is_that_of_torch(void):
    nets, X, y = scene()
    y = with_void(y, void, absent=1)
    module = nets.build_module()
    module.load_state_dict(mix(nets, np.full(4, 0.25)))
    expected = float(ignoring(void)(logits_of(module, X), torch.as_tensor(y)))
    own = partial(nn.functional.cross_entropy, ignore_index=void)
    for criterion in (ignoring(void), own):
        soup = PaperMEHL(criterion=criterion, max_epochs=1, batch_size=None, shuffle=False)
        soup.fit(nets, X, y)
        assert soup.history_[0]["loss"][0] == pytest.approx(expected, rel=1e-5)


@VOIDS
def test_splits_scorers_loaders_and_comparisons(void):
    nets, X, y = scene()
    y = with_void(y, void, absent=1)
    used = y != void
    soup = MEHLSoup(
        criterion=ignoring(void), validation_fraction=0.3, max_epochs=1, random_state=0
    ).fit(nets, X, y)
    loader = DataLoader(TensorDataset(torch.as_tensor(X), torch.as_tensor(y)), batch_size=16)
    read = clone(soup).fit(nets, loader)
    assert np.array_equal(read.coef_, soup.coef_)
    assert read.score(loader) == soup.score(X, y) == (soup.predict(X) == y)[used].mean()
    expected = jaccard_score(y[used], soup.predict(X)[used], average="macro")
    for scoring, score in ((None, soup.score(X, y)), ("jaccard_macro", expected)):
        compared = compare_soups(
            nets, X, y, X, y, recipes={"mehl": clone(soup)}, scoring=scoring, measure_memory=False
        ).results[0]
        assert compared.held_out == compared.test == score


def test_soups_that_ignore_other_labels_are_not_compared():
    nets, X, y = scene()
    recipes = {"best": BestCheckpoint(), "mehl": MEHLSoup(criterion=ignoring(0), max_epochs=1)}
    with pytest.raises(ValueError, match=r"the criterion leaves out some of them \(ignore_index\)"):
        compare_soups(nets, X, y, X, y, recipes=recipes, measure_memory=False)


def test_stored_scores_of_other_criteria_are_kept_apart(tmp_path):
    nets, X, y = scene()
    for void in (0, 1, -100, 0):
        soup = MEHLSoup(criterion=ignoring(void), max_epochs=1, random_state=0)
        plain = clone(soup).fit(nets, X, y)
        stored = soup.set_params(memory=tmp_path).fit(nets, X, y)
        assert np.array_equal(stored.coef_, plain.coef_)
        assert stored.held_out_scores_ == plain.held_out_scores_


@VOIDS
def test_searches_of_scikit_learn(void):
    nets, X, y = scene()
    y = with_void(y, void, absent=1)
    soup = MEHLSoup(nets, criterion=ignoring(void), max_epochs=1, random_state=0)
    search = GridSearchCV(soup, {"lr": [0.01, 0.05]}, cv=KFold(2)).fit(X, y)
    first, second = np.split(np.arange(40), 2)
    expected = []
    for train, test in ((second, first), (first, second)):
        fitted = clone(soup).set_params(lr=0.05).fit(X[train], y[train])
        expected.append((fitted.predict(X[test]) == y[test])[y[test] != void].mean())
    assert search.cv_results_["mean_test_score"][1] == pytest.approx(np.mean(expected))
    assert search.score(X, y) == (search.predict(X) == y)[y != void].mean()


@VOIDS
def test_the_search_over_nets(void):
    nets, X, y = scene()
    y = with_void(y, void, absent=1)
    net = NeuralNetClassifier(
        nets.build_module(), criterion=nn.CrossEntropyLoss, criterion__ignore_index=void,
        train_split=None, max_epochs=2, verbose=0,
    )  # fmt: skip
    search = SoupSearchCV(
        net, {"lr": [0.01, 0.1]}, n_iter=2, random_state=0, cv=ShuffleSplit(1, random_state=0),
        soup=MEHLSoup(criterion=ignoring(void), max_epochs=1, random_state=0),
        scoring=lambda net, X, y: np.mean((net.predict(X) == y)[y != void]),
    ).fit(X, y)  # fmt: skip
    assert search.cv_results_["error"] == [None, None]
    used = y != void
    assert search.score(X, y) == (search.predict(X) == y)[used].mean()


# ---------------------------------------------------------------- without such a criterion


@pytest.mark.parametrize(
    ("void", "dtype", "absent"),
    [(255, np.int64, 1), (255, np.uint8, None), (-1, np.int8, 1), (7, np.int32, None)],
)
@pytest.mark.parametrize("soup", [GreedySoup(), MEHLSoup(criterion=nn.CrossEntropyLoss)])
def test_positions_are_never_matched_in_sorted_order(soup, void, dtype, absent):
    nets, X, y = scene()
    y = with_void(y, void, absent).astype(dtype)
    passed = "Or pass it to the criterion as ignore_index. " * isinstance(soup, MEHLSoup)
    message = (
        rf"y can't be matched .* it holds {void}, expected integers in \[0, 4\), or -100 at "
        rf"positions to ignore\. If {void} marks positions without a label, replace it by -100: "
        rf"(y.*{void}.*-100.*)\. {passed}If {void} is a label, pass all labels .* classes=\["
    )
    with pytest.raises(ValueError, match=message) as caught:
        clone(soup).fit(nets, X, y)
    names = {"y": y.copy(), "np": np}
    exec(re.search(message, str(caught.value))[1], names)  # the code in the message
    assert np.array_equal(names["y"] == -100, y == void)
    assert clone(soup).fit(nets, X, names["y"]).classes_.tolist() == [0, 1, 2, 3]


def test_errors_name_other_labels_of_positions():
    nets, X, y = scene()
    several = np.where(y == 1, 254, with_void(y, 255))
    with pytest.raises(
        ValueError, match=r"254, 255, .* y\[np.isin\(y, \[254, 255\]\)\] = -100\. If"
    ):
        GreedySoup().fit(nets, X, several)
    with pytest.raises(ValueError, match=r"not in classes: 255\. If 255 marks .* y\[y == 255\]"):
        GreedySoup(classes=range(N)).fit(nets, X, with_void(y, 255))
    soup = GreedySoup().fit(nets, X, y)
    for score in (soup.score, soup.mean_log_likelihood, scorer_of(soup, "f1_macro")):
        arguments = (soup, X) if not hasattr(score, "__self__") else (X,)
        with pytest.raises(ValueError, match=r"not classes of the soup: 255\. .*y\[y == 255\]"):
            score(*arguments, with_void(y, 255))
    with pytest.raises(ValueError, match="contains only -100, 255"):
        MEHLSoup(criterion=ignoring(255)).fit(nets, X, np.where(y > 1, 255, -100))


def test_masks_of_one_logit():
    torch.manual_seed(0)
    nets = CheckpointCollection(around(nn.Conv2d(2, 1, 1), 3, 0.2))
    X, y = torch.randn(20, 2, 6, 6).numpy(), np.arange(20 * 36).reshape(20, 6, 6) % 2
    with pytest.raises(ValueError, match=r"holds 255, expected integers in \[0, 2\).*255 marks"):
        GreedySoup().fit(nets, X, 255 * y)
    assert set(GreedySoup(classes=[0, 255]).fit(nets, X, 255 * y).classes_) == {0, 255}
    void = with_void(y, 255)
    with pytest.raises(ValueError, match=r"y has 3 \(0, 1, 255\).* y\[y == 255\] = -100"):
        GreedySoup().fit(nets, X, void)

    class Binary(nn.BCEWithLogitsLoss):
        ignore_index = 255

        def forward(self, z, y):
            return super().forward(z[y != 255], y[y != 255])

    soup, marked = (
        MEHLSoup(criterion=criterion, max_epochs=1, random_state=0).fit(nets, X, labels)
        for criterion, labels in ((Binary, void), (None, np.where(void == 255, -100, void)))
    )
    np.testing.assert_allclose(soup.coef_, marked.coef_, atol=1e-5)
    assert soup.score(X, void) == (soup.predict(X) == void)[void != 255].mean()


@pytest.mark.parametrize(
    ("classes", "void", "dense", "message"),
    [
        ([2, 0, 1, 3], 0, True, "ignore_index is 0, but output 0 has the label 2"),
        ([10, 20, 30, 40], 0, False, "ignore_index is 0, but output 0 has the label 10"),
        ([0, 1, 2, 255], 255, True, "ignore_index is 255, but it is a class"),
        ([0, 1, 2, -1], -1, False, "ignore_index is -1, but it is a class"),
        ([0, 1, 2, -100], -100, True, "classes holds -100, which marks"),
    ],
)
def test_what_is_ignored_must_be_certain(classes, void, dense, message):
    nets, X, y = scene()
    y = np.array(classes)[y]
    if not dense:
        nets, X, y = (
            CheckpointCollection([nn.Linear(72, 4) for _ in range(2)]),
            X.reshape(40, -1),
            y[:, 0, 0],
        )
    with pytest.raises(ValueError, match=message):
        MEHLSoup(criterion=ignoring(void), classes=classes).fit(nets, X, y)


def test_masks_without_the_first_class_are_warned_of():
    nets, X, y = scene()
    y = with_void(y.clip(1), -100)
    with pytest.warns(SoupWarning, match="y holds integers below 4, the number of outputs, but no"):
        UniformSoup().fit(nets, X, y)


# ---------------------------------------------------------------- one label per row, and texts


@pytest.mark.parametrize("labels", [None, ["a", "b", "c"]])
@pytest.mark.parametrize("weight", [None, np.arange(60) % 5 / 2])
def test_rows_of_a_class_that_the_criterion_ignores(zoo: Zoo, labels, weight):
    y = zoo.y if labels is None else np.array(labels)[zoo.y]
    used = zoo.y != 0
    soup = MEHLSoup(criterion=ignoring(0), batch_size=None, max_epochs=1, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, y, sample_weight=weight)
    w = None if weight is None else weight[used]
    without = clone(soup).set_params(
        criterion=None, classes=[0, 1, 2] if labels is None else labels
    )
    without.fit(zoo.checkpoints, zoo.X[used], y[used], sample_weight=w)
    np.testing.assert_allclose(soup.coef_, without.coef_, atol=1e-5)
    for name, score in without.held_out_scores_.items():
        assert soup.held_out_scores_[name] == pytest.approx(score)
    predicted = soup.predict(zoo.X[used])
    right = np.average(predicted == y[used], weights=w)
    assert soup.score(zoo.X, y, weight) == pytest.approx(right)
    expected = f1_score(y[used], predicted, average="macro", sample_weight=w)
    found = scorer_of(soup, "f1_macro")(soup, zoo.X, y, sample_weight=weight)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("void", [-1, 255])
def test_rows_without_a_label_are_removed_by_the_user(zoo: Zoo, void):
    y = np.where(zoo.y == 1, void, zoo.y)
    with pytest.raises(ValueError, match=f"y holds {void}, .* each row has one label. Remove"):
        MEHLSoup(criterion=ignoring(void)).fit(zoo.checkpoints, zoo.X, y)


@pytest.mark.filterwarnings("ignore:These checkpoints were not fine-tuned from the same weights")
@pytest.mark.parametrize(("kind", "void"), [("gpt2", 0), ("bert", -1), ("t5", -1)])
def test_tokens_that_the_criterion_ignores(kind, void):
    X, y = texts(kind)
    nets = language_models(kind)
    named = y.masked_fill(y == -100, void)
    soup = MEHLSoup(task="language-modeling", max_epochs=1, random_state=0, batch_size=8)
    plain = clone(soup).fit(nets, X, y)
    soup.set_params(criterion=ignoring(void)).fit(nets, X, named)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert soup.held_out_scores_ == plain.held_out_scores_
    assert soup.score(X, named) == plain.score(X, y)
