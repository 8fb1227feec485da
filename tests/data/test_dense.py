"""Labels of pixels and tokens."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score, jaccard_score, log_loss, roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForTokenClassification

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    UniformSoup,
    mix,
)
from sksoup.inspection import compare_soups
from sksoup.recipes.greedy import uniform_coef

from ..references import greedy_reference
from ..zoo import PaperMEHL, Zoo, around

SOUPS = [
    CheckpointEnsemble(),
    GreedySoup(),
    LearnedSoup(max_epochs=2, random_state=0),
    MEHLSoup(layerwise=True, model_batch_size=2, max_epochs=2, random_state=0),
]
every_soup = pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)


class Segmenter(nn.Module):
    """(n, 1, 5, 4) images to (n, 3, 5, 4) logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def forward(self, X):
        return self.layers(X)


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    checkpoints = CheckpointCollection(around(Segmenter(), 4, 0.3), module=Segmenter)
    X = torch.randn(30, 1, 5, 4)
    with torch.no_grad():
        y = checkpoints.build_module()(X).argmax(1)
    y[torch.rand(y.shape) < 0.3] = 0
    y[torch.rand(y.shape) < 0.2] = -100
    return checkpoints, X.numpy(), y.numpy()


def accuracy(checkpoints, subset, X, y):
    module = checkpoints.build_module().eval()
    module.load_state_dict(mix(checkpoints, uniform_coef(subset, len(checkpoints))))
    with torch.no_grad():
        predicted = module(torch.as_tensor(X)).argmax(1).numpy()
    return (predicted == y)[y != -100].mean()


@every_soup
def test_labels_of_pixels(pixels, soup):
    checkpoints, X, y = pixels
    soup = clone(soup).fit(checkpoints, X, y)
    assert soup.classes_.tolist() == [0, 1, 2]
    predicted = soup.predict(X)
    assert predicted.shape == y.shape
    assert soup.predict_proba(X).shape == (30, 3, 5, 4)
    np.testing.assert_allclose(soup.predict_proba(X).sum(axis=1), 1, atol=1e-6)
    assert soup.score(X, y) == (predicted == y)[y != -100].mean()
    data = TensorDataset(torch.as_tensor(X), torch.as_tensor(y))
    assert np.array_equal(clone(soup).fit(checkpoints, data).coef_, soup.coef_)


def test_greedy_is_the_obvious_one(pixels):
    checkpoints, X, y = pixels
    soup = GreedySoup().fit(checkpoints, X, y)
    scores = [accuracy(checkpoints, [k], X, y) for k in range(4)]
    assert list(soup.individual_scores_.values()) == scores
    kept = greedy_reference(scores, lambda subset: accuracy(checkpoints, subset, X, y))
    assert soup.ingredients_ == tuple(checkpoints.names[k] for k in kept)
    split = GreedySoup(ranking_fraction=0.5, random_state=0).fit(checkpoints, X, y)
    assert split.path_[0]["n_rows"] == 15


METRICS = {
    "jaccard_macro": lambda y, predicted, p, w: jaccard_score(
        y, predicted, average="macro", sample_weight=w
    ),
    "balanced_accuracy": lambda y, predicted, p, w: balanced_accuracy_score(
        y, predicted, sample_weight=w
    ),
    "accuracy": lambda y, predicted, p, w: np.average(y == predicted, weights=w),
    "roc_auc_ovr": lambda y, predicted, p, w: np.mean(
        [roc_auc_score(y == k, p[:, k], sample_weight=w) for k in range(3)]
    ),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_scorers_of_scikit_learn_see_the_labeled_pixels(pixels, metric, order):
    checkpoints, X, y = pixels
    weight = None if metric == "roc_auc_ovr" else np.arange(30) % 4 / 2
    named = np.where(y == -100, -100, np.array(order)[y.clip(min=0)])
    best = BestCheckpoint(scoring=metric, classes=order)
    best.fit(checkpoints, X, named, sample_weight=weight)
    used = y != -100
    each = None if weight is None else np.repeat(weight, used.reshape(30, -1).sum(axis=1))
    for name, score in best.individual_scores_.items():
        module = checkpoints.build_module()
        module.load_state_dict(checkpoints[name])
        with torch.no_grad():
            p = module(torch.as_tensor(X)).softmax(1).movedim(1, -1).numpy()[used]
        assert score == pytest.approx(METRICS[metric](y[used], p.argmax(1), p, each))
    compared = compare_soups(
        checkpoints, X, named, X, named, recipes={"best": clone(best)}, scoring=metric,
        measure_memory=False,
    )  # fmt: skip
    assert compared.results[0].test == compared.results[0].held_out


def test_ignored_positions_are_out_of_loss_and_score(pixels):
    checkpoints, X, y = pixels
    soup = PaperMEHL(max_epochs=1, batch_size=None, shuffle=False).fit(checkpoints, X, y)
    module = checkpoints.build_module()
    module.load_state_dict(mix(checkpoints, np.full(4, 0.25)))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(module(torch.as_tensor(X)), torch.as_tensor(y))
    assert soup.history_[0]["loss"][0] == pytest.approx(float(loss), rel=1e-5)
    criterion = nn.CrossEntropyLoss(ignore_index=255)  # the criterion may call them otherwise
    again = clone(soup).set_params(criterion=criterion).fit(checkpoints, X, y)
    assert np.array_equal(again.coef_, soup.coef_)


def test_weights_of_rows(pixels):
    checkpoints, X, y = pixels
    weight = np.arange(30) % 2
    soup = UniformSoup().fit(checkpoints, X, y)
    rows = weight == 1
    assert soup.score(X, y, weight) == pytest.approx(soup.score(X[rows], y[rows]))
    greedy = GreedySoup().fit(checkpoints, X, y, sample_weight=weight)
    half = GreedySoup().fit(checkpoints, X[rows], y[rows])
    assert greedy.ingredients_ == half.ingredients_


def test_labels_of_tokens_with_the_axis_moved(pixels):
    class Tagger(nn.Module):
        """(n, 7) tokens to (n, 7, 3) logits, as in transformers."""

        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

        def forward(self, X):
            return self.head(self.words(X).tanh())

    torch.manual_seed(0)
    checkpoints = CheckpointCollection(around(Tagger(), 3, 0.3))
    X, y = torch.randint(0, 11, (40, 7)), torch.randint(0, 3, (40, 7))
    soup = MEHLSoup(max_epochs=1, random_state=0)
    with pytest.raises(ValueError, match=r"expected \(1, n_outputs, 7\).*movedim"):
        soup.fit(checkpoints, X, y)
    soup.set_params(forward=lambda module, X: module(X).movedim(-1, 1)).fit(checkpoints, X, y)
    assert soup.predict(X).shape == (40, 7)


def tagger(kind):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_labels": 5}
    return kind(BertConfig(hidden_size=8, intermediate_size=8, vocab_size=11, **sizes))


class Moved(BertForTokenClassification):
    """One that returns (n, labels, tokens)."""

    def forward(self, **X):
        return super().forward(**X).logits.movedim(-1, 1)


@pytest.mark.parametrize("n_tokens", [5, 7])
def test_logits_of_tokens_are_never_taken_for_another_axis(n_tokens):
    torch.manual_seed(0)
    states = [net.state_dict() for net in around(tagger(BertForTokenClassification), 3, 0.3)]
    nets = CheckpointCollection(states, module=lambda: tagger(BertForTokenClassification))
    X, y = {"input_ids": torch.randint(0, 11, (40, n_tokens))}, torch.randint(0, 5, (40, n_tokens))
    message = re.escape("forward=lambda module, X: module(**X).logits.movedim(-1, 1).")
    with pytest.raises(ValueError, match=message):  # also with as many tokens as labels
        GreedySoup().fit(nets, X, y)
    soup = GreedySoup(forward=lambda module, X: module(**X).logits.movedim(-1, 1)).fit(nets, X, y)
    with torch.no_grad():
        assert np.array_equal(soup.predict(X), soup.module_(**X).logits.argmax(-1))
    own = CheckpointCollection(states, module=lambda: tagger(Moved))
    assert np.array_equal(GreedySoup().fit(own, X, y).predict(X), soup.predict(X))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 0.5, "expected integers for labels at several.* task='regression'"),
        (lambda y: y[:, :, :3], "outputs of this shape: forward="),
        (lambda y: np.where(y == -100, np.inf, y), "expected integers for labels at several"),
        (lambda y: np.full_like(y, -100), "contains only -100"),
        (lambda y: y[:-1], "inconsistent numbers of samples"),
        (lambda y: y[:, :2], r"expected \(1, n_outputs, 2, 4\)"),
        (lambda y: y[:, None], r"expected \(1, n_outputs, 1, 5, 4\).*y\[:, 0\]"),
        (lambda y: y + 50, "can't be matched to the module's outputs"),
    ],
)
def test_labels_that_do_not_fit(pixels, change, message):
    checkpoints, X, y = pixels
    with pytest.raises(ValueError, match=message):
        UniformSoup().fit(checkpoints, X, change(y))


def test_rows_with_fewer_labels_count_less_with_weights_and_without(pixels):
    checkpoints, X, y = pixels
    y[::3, :, 1:] = -100  # a third of the rows keeps five positions
    soup = MEHLSoup(layerwise=True, batch_size=None, max_epochs=2, random_state=0)
    plain = clone(soup).fit(checkpoints, X, y)
    ones = clone(soup).fit(checkpoints, X, y, sample_weight=np.ones(30))
    np.testing.assert_allclose(ones.coef_, plain.coef_, atol=1e-6)
    losses = [record["loss"] for fit in (plain, ones) for record in fit.history_]
    np.testing.assert_allclose(losses[: len(losses) // 2], losses[len(losses) // 2 :], rtol=1e-5)


def test_accumulated_minibatches_are_one_whatever_is_left_out(pixels):
    checkpoints, X, y = pixels
    y[::3, :, 1:] = -100
    soup = MEHLSoup(batch_size=None, max_epochs=1, shuffle=False)
    whole = clone(soup).fit(checkpoints, X, y)
    parts = clone(soup).set_params(batch_size=7, accumulate=5).fit(checkpoints, X, y)
    assert parts.history_[0]["loss"] == pytest.approx(whole.history_[0]["loss"], rel=1e-5)
    assert parts.history_[0]["score"] == pytest.approx(whole.history_[0]["score"], rel=1e-5)


@pytest.mark.parametrize("weight", [None, np.ones(30)])
def test_a_minibatch_without_any_label_adds_nothing(pixels, weight):
    checkpoints, X, y = pixels
    y[29] = -100  # the last minibatch, alone
    soup = MEHLSoup(batch_size=29, max_epochs=2, shuffle=False, random_state=0)
    fitted = soup.fit(checkpoints, X, y, sample_weight=weight)
    assert fitted.history_[0]["loss"][1] == 0
    assert np.isfinite(fitted.coef_).all()
    held = clone(soup).set_params(validation_fraction=0.3, batch_size=1)
    y[10:] = -100  # most rows
    assert np.isfinite(held.fit(checkpoints, X, y).history_[0]["validation_loss"])


def test_what_a_criterion_leaves_out_is_not_scored(pixels):
    checkpoints, X, y = pixels
    scores = [
        MEHLSoup(criterion=criterion, batch_size=None, max_epochs=1, shuffle=False)
        .fit(checkpoints, X, y)
        .history_[0]["score"]
        for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=255))
    ]
    assert scores[0] == scores[1]


def per_row(output, y):
    return nn.functional.cross_entropy(output, y, reduction="none").flatten(1).mean(1)


@pytest.mark.parametrize("left_out", [True, False])
@pytest.mark.parametrize("criterion", [
    nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none"), per_row,
], ids=["mean", "none", "per row"])  # fmt: skip
def test_all_ways_to_weigh_the_same_rows_agree(pixels, criterion, left_out):
    checkpoints, X, y = pixels
    y[::3, :, 1:] = -100
    if not left_out:
        y[y == -100] = 0
    losses = []
    for weight, params in (
        (None, {"batch_size": None}),
        (np.ones(30), {"batch_size": None}),
        (None, {"batch_size": 7, "accumulate": 5}),
        (np.full(30, 2.0), {"batch_size": 7, "accumulate": 5}),
    ):
        soup = MEHLSoup(criterion=criterion, max_epochs=1, shuffle=False, **params)
        losses.append(soup.fit(checkpoints, X, y, sample_weight=weight).history_[0]["loss"][0])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


class Ignoring(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(ignore_index=255)


class Indifferent(nn.CrossEntropyLoss):
    """As losses of segmentation libraries say that they leave nothing out."""

    def __init__(self):
        super().__init__()
        self.ignore_index = None

    def forward(self, output, y):
        return nn.functional.cross_entropy(output, y)


def test_criteria_that_say_what_they_leave_out_in_their_own_way(pixels):
    checkpoints, X, y = pixels
    plain, own, none = (
        MEHLSoup(criterion=criterion, max_epochs=1, random_state=0).fit(checkpoints, X, y).coef_
        for criterion in (None, Ignoring, Indifferent())
    )
    assert np.array_equal(plain, own)
    assert np.array_equal(plain, none)


def test_whole_rows_may_be_left_out(zoo: Zoo):
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    order = np.argsort(zoo.y, kind="stable")  # the first minibatches hold nothing that counts
    X, y = zoo.X[order], zoo.y[order]
    soup = MEHLSoup(criterion=criterion, max_epochs=1, shuffle=False)
    whole = clone(soup).set_params(batch_size=None).fit(zoo.checkpoints, X, y)
    parts = clone(soup).set_params(batch_size=7, accumulate=9).fit(zoo.checkpoints, X, y)
    assert parts.history_[0]["loss"] == pytest.approx(whole.history_[0]["loss"], rel=1e-5)
    small = clone(soup).set_params(batch_size=7).fit(zoo.checkpoints, X, y)
    assert small.history_[0]["loss"][0] == 0
    kept = MEHLSoup(max_epochs=1, batch_size=None, shuffle=False, classes=[0, 1, 2])
    kept.fit(zoo.checkpoints, X[20:], y[20:])
    assert kept.history_[0]["loss"] == pytest.approx(whole.history_[0]["loss"], rel=1e-5)


def test_nothing_with_a_label_to_choose_by(pixels):
    checkpoints, X, y = pixels
    y[1:] = -100
    for soup in (
        MEHLSoup(validation_fraction=0.3, random_state=0),
        GreedySoup(ranking_fraction=0.3),
    ):
        with pytest.raises(ValueError, match="have a sample_weight of 0 or no label"):
            soup.set_params(classes=[0, 1, 2]).fit(checkpoints, X, y)
    weight = np.ones(30)
    weight[0] = 0
    with pytest.raises(ValueError, match="sample_weight is 0 for all rows that have a label"):
        MEHLSoup().fit(checkpoints, X, y, sample_weight=weight)


@pytest.mark.parametrize(
    ("X", "wrap", "code"),
    [
        (torch.ones(4, 5), lambda out: out, "module(X)"),
        ({"x": torch.ones(4, 5)}, lambda out: SimpleNamespace(logits=out), "module(**X).logits"),
        ((torch.ones(4, 5),), lambda out: (out,), "module(*X)[0]"),
    ],
)
def test_the_advice_to_move_an_axis_is_code_that_fits_the_module(X, wrap, code):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return wrap(x[..., None] * self.scale)  # (N, 5, 3)

    y = np.arange(20).reshape(4, 5) % 3
    nets = CheckpointCollection([Last() for _ in range(2)])
    message = re.escape(f"forward=lambda module, X: {code}.movedim(-1, 1).")
    with pytest.raises(ValueError, match=message):
        UniformSoup().fit(nets, X, y)


# ------------------------------------------------------------- one logit for each position


class Mask(nn.Module):
    """(n, 1, 5, 4) images to one logit per pixel, (n, 1, 5, 4) or (n, 5, 4)."""

    def __init__(self, has_channel=True):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1))
        self.has_channel = has_channel

    def forward(self, X):
        return self.layers(X) if self.has_channel else self.layers(X)[:, 0]


def two_channels(module, X):
    z = module(X)
    return torch.cat([torch.zeros_like(z), z], dim=1)


@pytest.fixture
def masks():
    torch.manual_seed(0)
    states = [net.state_dict() for net in around(Mask(), 4, 0.4)]
    X, y = torch.randn(30, 1, 5, 4), torch.randint(0, 2, (30, 5, 4))
    y[torch.rand(y.shape) < 0.2] = -100
    return states, X.numpy(), y.numpy()


@every_soup
def test_one_logit_per_pixel_is_two_of_which_one_is_zero(masks, soup):
    states, X, y = masks
    nets = CheckpointCollection(states, module=Mask)
    two = clone(soup).set_params(forward=two_channels).fit(nets, X, y)
    one = clone(soup).fit(nets, X, y)
    flat = CheckpointCollection(states, module=lambda: Mask(has_channel=False))
    for found in (one, clone(soup).fit(flat, X, y)):
        assert np.array_equal(found.coef_, two.coef_)
        assert found.predict_proba(X).shape == (30, 2, 5, 4)
        assert np.array_equal(found.predict_proba(X), two.predict_proba(X))
        assert found.score(X, y) == two.score(X, y)
        assert found.mean_log_likelihood(X, y) == two.mean_log_likelihood(X, y)
    same = clone(soup).fit(nets, X, y[:, None])
    assert np.array_equal(same.coef_, one.coef_)
    assert np.array_equal(same.predict(X), one.predict(X)[:, None])
    assert same.score(X, y[:, None]) == one.score(X, y)
    named = np.where(y == 1, 255, y)  # as images store masks
    white = clone(soup).set_params(classes=[0, 255]).fit(nets, X, named)
    assert np.array_equal(white.predict(X), 255 * one.predict(X))


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_masks_of_booleans_and_floats_are_labels(masks, dtype):
    states, X, y = masks
    nets = CheckpointCollection(states, module=Mask)
    y[y == -100] = 0
    soup = LearnedSoup(max_epochs=1, random_state=0)
    plain = clone(soup).fit(nets, X, y)
    given = clone(soup).fit(nets, X, y.astype(dtype))
    assert given.classes_.tolist() == [0, 1]
    assert np.array_equal(given.coef_, plain.coef_)
    assert given.score(X, y.astype(dtype)) == plain.score(X, y)
    likelihoods = [s.mean_log_likelihood(X, t) for s, t in ((given, y.astype(dtype)), (plain, y))]
    assert likelihoods[0] == likelihoods[1]
    background = clone(soup).fit(nets, X, np.zeros_like(y, dtype=dtype))
    assert background.classes_.tolist() == [0, 1]


@pytest.mark.parametrize("weight", [None, np.arange(30) % 4 / 2])
def test_a_criterion_for_one_logit_per_pixel_gets_it(masks, weight):
    states, X, y = masks
    nets = CheckpointCollection(states, module=Mask)
    soup = MEHLSoup(max_epochs=1, random_state=0)
    binary = clone(soup).set_params(criterion=nn.BCEWithLogitsLoss)
    with pytest.raises(ValueError, match="has no ignore_index"):
        binary.fit(nets, X, y, sample_weight=weight)
    y[y == -100] = 0
    plain = clone(soup).fit(nets, X, y, sample_weight=weight)
    binary.fit(nets, X, y, sample_weight=weight)
    np.testing.assert_allclose(binary.coef_, plain.coef_, atol=1e-5)


def test_one_logit_per_pixel_distinguishes_two_labels(masks):
    states, X, y = masks
    nets = CheckpointCollection(states, module=Mask)
    y[0, 0] = 2
    message = "one logit per position distinguishes two labels, but y has 3 (0, 1, 2). Expected (1,"
    with pytest.raises(ValueError, match=re.escape(message)):
        GreedySoup().fit(nets, X, y)
    soup = GreedySoup().fit(nets, X, y.clip(0, 1))
    with pytest.raises(ValueError, match="no net for one logit per position"):
        soup.to_skorch()


def test_log_loss_of_pixels(pixels):
    checkpoints, X, y = pixels
    weight = np.random.default_rng(0).random(len(y))
    soup = GreedySoup(scoring="neg_log_loss", batch_size=7).fit(
        checkpoints, X, y, sample_weight=weight
    )
    with torch.no_grad():
        logits = soup.module_(torch.as_tensor(X))
    each = nn.functional.cross_entropy(logits, torch.as_tensor(y), reduction="none").double()
    w = torch.as_tensor(weight)[:, None, None] * torch.as_tensor(y != -100)
    expected = -float((w * each).sum() / w.sum())
    assert soup.mean_log_likelihood(X, y, sample_weight=weight) == pytest.approx(expected, abs=1e-6)
    assert soup.path_[-1]["score"] <= max(tried["score"] for tried in soup.path_)
    kept = [tried["score"] for tried in soup.path_ if tried["kept"]][-1]
    assert kept == pytest.approx(expected, abs=1e-5)


def test_log_loss_of_rows_is_that_of_scikit_learn():
    torch.manual_seed(0)
    checkpoints = CheckpointCollection([nn.Linear(4, 3) for _ in range(3)])
    X, y = torch.randn(20, 4).numpy(), np.arange(20) % 3
    soup = LearnedSoup(max_epochs=1, random_state=0, center="mean").fit(checkpoints, X, y)
    soup.temperature_ = 1.7
    expected = log_loss(y, soup.predict_proba(X))
    assert soup.mean_log_likelihood(X, y) == pytest.approx(-expected, abs=1e-6)


def test_labels_of_other_positions_than_the_predictions_are_refused():
    nets = around(nn.Conv2d(3, 2, 1), 2)
    X = np.random.default_rng(0).normal(size=(8, 3, 5, 5)).astype(np.float32)
    y = (X[:, 0] > 0).astype(int)
    soup = UniformSoup().fit(CheckpointCollection(nets), X, y)
    for wrong in (y[:, :4], y[..., None], y[:, 0]):
        for score in (soup.score, soup.mean_log_likelihood):
            with pytest.raises(ValueError, match=r"y has shape .* expected one label for each"):
                score(X, wrong)
    with pytest.raises(ValueError, match="y has"):
        soup.score(X, y[:3])


def test_labels_of_tokens_need_two_dimensions():
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    ids = np.arange(12).reshape(3, 4) % 9
    soup = UniformSoup(task="causal-lm").fit(CheckpointCollection(around(Text(), 2)), ids)
    with pytest.raises(ValueError, match=r"y has shape \(3,\), but .* of 4 tokens"):
        soup.score(ids, ids[:, 0])
