"""What modules take and give: several inputs, forward callables, one logit, class weights."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import make_scorer, matthews_corrcoef
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.helper import SliceDict
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from sksoup import (
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    UniformSoup,
)
from sksoup.inspection import loss_barrier
from sksoup.model_selection import SoupSearchCV

from ..zoo import PaperMEHL, Zoo, around

SOUPS = [
    CheckpointEnsemble(),
    GreedySoup(batch_size=25),
    LearnedSoup(max_epochs=2, batch_size=25, random_state=0),
    MEHLSoup(layerwise=True, model_batch_size=3, max_epochs=2, batch_size=25, random_state=0),
]
every_soup = pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)


class Named(nn.Module):
    """The net of the zoo, with its input by another name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, rows):
        return self.layers(rows)


@pytest.fixture
def named():
    torch.manual_seed(0)
    return CheckpointCollection(around(Named(), 5, spread=0.3), module=Named)


@every_soup
def test_the_same_bits_whichever_form_the_data_takes(named, zoo: Zoo, soup):
    forms = {
        "array": zoo.X,
        "reversed": zoo.X[::-1].copy()[::-1],
        "tensor": torch.as_tensor(zoo.X),
        "list": zoo.X.tolist(),
        "dict": {"rows": zoo.X},
        "SliceDict": SliceDict(rows=zoo.X),
        "tuple": (torch.as_tensor(zoo.X),),
    }
    plain = clone(soup).fit(named, zoo.X, zoo.y)
    for form, X in forms.items():
        fitted = clone(soup).fit(named, X, zoo.y)
        assert np.array_equal(fitted.coef_, plain.coef_), form
        assert (fitted.predict_proba(X) == plain.predict_proba(zoo.X)).all()
        assert fitted.score(X, zoo.y) == plain.score(zoo.X, zoo.y)
        assert (pickle.loads(pickle.dumps(fitted)).predict(X) == plain.predict(zoo.X)).all()
    asked = clone(soup).set_params(forward=lambda module, X: {"logits": module.layers(X[:, :4])})
    asked.fit(named, np.hstack([zoo.X, zoo.X]), zoo.y)
    assert np.array_equal(asked.coef_, plain.coef_)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Embedding(5, 3)

    def forward(self, left, right):
        return {"hidden": left, "logits": self.left(left) + self.right(right)}


@pytest.fixture
def two(zoo: Zoo):
    torch.manual_seed(0)
    kinds = np.arange(60) % 5
    return CheckpointCollection(around(TwoInputs(), 4, 0.3)), {"left": zoo.X, "right": kinds}


@every_soup
def test_several_inputs_by_name_or_by_position(two, zoo: Zoo, soup):
    checkpoints, X = two
    by_name = clone(soup).fit(checkpoints, X, zoo.y)
    turned = clone(soup).fit(checkpoints, dict(reversed(X.items())), zoo.y)
    by_position = clone(soup).fit(checkpoints, (X["left"], X["right"]), zoo.y)
    assert np.array_equal(by_name.coef_, by_position.coef_)
    assert np.array_equal(by_name.coef_, turned.coef_)
    expected = by_name.predict(X)
    assert (by_position.predict((X["left"], X["right"])) == expected).all()
    assert not hasattr(by_name, "n_features_in_")


def test_several_inputs_with_a_scorer_a_split_and_a_barrier(two, zoo: Zoo):
    checkpoints, X = two
    scorer = make_scorer(matthews_corrcoef)
    soup = GreedySoup(scoring=scorer, ranking_fraction=0.5, random_state=0)
    soup.fit(checkpoints, X, zoo.y)
    assert soup.path_[0]["n_rows"] == 30
    assert np.isfinite(loss_barrier(checkpoints, X, zoo.y, n_points=2).losses).all()
    rows = SliceDict(**X)
    search = GridSearchCV(UniformSoup(), {"checkpoints": [checkpoints]}, cv=2).fit(rows, zoo.y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X: {**X, "right": X["right"][:-1]}, "inconsistent numbers of samples"),
        (lambda X: {**X, "left": X["left"] * np.nan}, "contains NaN"),
        (
            lambda X: {"left": X["left"]},
            r"does not accept X: with one row of left: shape \(1, 4\).*right",
        ),
        (lambda X: {**X, "more": X["left"]}, "does not accept X.*more"),
        (
            lambda X: {**X, "right": X["left"]},
            r"does not accept X.*right: shape \(1, 4\) and dtype",
        ),
    ],
)
def test_inputs_that_do_not_fit(two, zoo: Zoo, change, message):
    checkpoints, X = two
    with pytest.raises(ValueError, match=message):
        UniformSoup().fit(checkpoints, change(X), zoo.y)


def test_other_inputs_than_in_fit(two, zoo: Zoo):
    checkpoints, X = two
    soup = UniformSoup().fit(checkpoints, X, zoo.y)
    with pytest.raises(ValueError, match="got one array, expected a mapping with 'left', 'right'"):
        soup.predict(zoo.X)
    with pytest.raises(ValueError, match="got a tuple of 2 arrays, expected a mapping"):
        soup.predict((X["left"], X["right"]))
    with pytest.raises(ValueError, match="got a mapping with 'left', expected"):
        soup.predict({"left": X["left"]})


def test_bad_forward(zoo: Zoo):
    with pytest.raises(TypeError, match="forward must be"):
        UniformSoup(forward="module").fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(TypeError, match=r"returned a float.*forward=lambda module, X"):
        UniformSoup(forward=lambda module, X: 1.0).fit(zoo.checkpoints, zoo.X, zoo.y)


# ---------------------------------------------------------------- models of Hugging Face


def bert():
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3, max_position_embeddings=10,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def test_a_tokenised_dict_for_a_transformer(zoo: Zoo):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    X = {
        "input_ids": rng.integers(0, 30, (60, 8)),
        "attention_mask": (np.arange(8) < rng.integers(3, 9, (60, 1))).astype(int),
    }
    checkpoints = CheckpointCollection(around(bert(), 3))
    soup = MEHLSoup(max_epochs=1, random_state=0).fit(checkpoints, X, zoo.y)
    with torch.no_grad():
        tensors = {name: torch.as_tensor(value) for name, value in X.items()}
        expected = soup.module_(**tensors).logits.softmax(1).numpy()
    np.testing.assert_allclose(soup.predict_proba(X), expected, atol=1e-6)

    def with_loss(module, X):
        return module(**X, labels=X["input_ids"][:, 0] % 3, return_dict=False)  # (loss, logits)

    again = MEHLSoup(max_epochs=1, random_state=0, forward=with_loss).fit(checkpoints, X, zoo.y)
    assert np.array_equal(again.coef_, soup.coef_)


# -------------------------------------------------------------------------- one logit


class OneLogit(nn.Module):
    def __init__(self, flat=False):
        super().__init__()
        self.flat = flat
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, X):
        z = self.layers(X)
        return z[:, 0] if self.flat else z


class TwoLogits(OneLogit):
    def forward(self, X):
        z = self.layers(X)
        return torch.cat([torch.zeros_like(z), z], dim=1)


@every_soup
@pytest.mark.parametrize("flat", [False, True])
def test_one_logit_is_two_of_which_one_is_zero(zoo: Zoo, soup, flat):
    torch.manual_seed(0)
    states = [module.state_dict() for module in around(OneLogit(), 4, 0.3)]
    y = np.where(zoo.y > 0, "yes", "no")
    one = clone(soup).fit(CheckpointCollection(states, module=lambda: OneLogit(flat)), zoo.X, y)
    two = clone(soup).fit(CheckpointCollection(states, module=TwoLogits), zoo.X, y)
    np.testing.assert_allclose(one.coef_, two.coef_, atol=1e-6)
    assert one.classes_.tolist() == ["no", "yes"]
    np.testing.assert_allclose(one.predict_proba(zoo.X), two.predict_proba(zoo.X), atol=1e-6)
    assert (one.predict(zoo.X) == two.predict(zoo.X)).all()
    if isinstance(soup, (GreedySoup, MEHLSoup)):
        z = one.module_(torch.as_tensor(zoo.X)).detach().reshape(-1)
        np.testing.assert_allclose(one.predict_proba(zoo.X)[:, 1], z.sigmoid(), atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_criterion_for_one_logit_gets_it(zoo: Zoo, weighted):
    torch.manual_seed(0)
    checkpoints = CheckpointCollection(around(OneLogit(), 4, 0.3))
    weight = np.arange(60) % 3.0 if weighted else None
    fits = [
        MEHLSoup(max_epochs=2, random_state=0, criterion=criterion).fit(
            checkpoints, zoo.X, zoo.y > 0, sample_weight=weight
        )
        for criterion in (None, nn.BCEWithLogitsLoss, nn.BCEWithLogitsLoss(torch.ones(())),
                          nn.BCEWithLogitsLoss(pos_weight=torch.tensor(5.0)))
    ]  # fmt: skip
    np.testing.assert_allclose(fits[0].coef_, fits[1].coef_, atol=1e-5)
    np.testing.assert_allclose(fits[0].coef_, fits[2].coef_, atol=1e-5)
    assert fits[3].history_[0]["loss"][0] > 1.1 * fits[0].history_[0]["loss"][0]


@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss, nn.CrossEntropyLoss(label_smoothing=0.1), nn.MultiMarginLoss(),
     nn.functional.cross_entropy, nn.functional.multi_margin_loss,
     partial(nn.functional.cross_entropy, label_smoothing=0.1),
     nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))],
)  # fmt: skip
def test_a_criterion_of_classes_gets_two_logits(zoo: Zoo, criterion):
    """Torch would take the logits of the rows for those of the classes of a single row."""
    torch.manual_seed(0)
    states = [module.state_dict() for module in around(OneLogit(), 4, 0.3)]
    one, two = (
        MEHLSoup(max_epochs=2, random_state=0, criterion=criterion).fit(
            CheckpointCollection(states, module=kind), zoo.X, zoo.y > 0
        )
        for kind in (OneLogit, TwoLogits)
    )
    np.testing.assert_allclose(one.coef_, two.coef_, atol=1e-6)


def test_one_logit_tells_two_labels_apart(zoo: Zoo):
    checkpoints = CheckpointCollection(around(OneLogit(), 2))
    with pytest.raises(ValueError, match="one logit distinguishes two labels, but y has 3"):
        UniformSoup().fit(checkpoints, zoo.X, zoo.y)


# ---------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("task", ["regression", "multilabel"])
@pytest.mark.parametrize(
    ("as_inputs", "call"),
    [
        (lambda X: X, "module(X)"),
        (lambda X: {"rows": X}, "module(**X)"),
        (lambda X: (torch.as_tensor(X),), "module(*X)"),
        (lambda X: TensorDataset(torch.as_tensor(X), torch.zeros(len(X), 4, 3)), "module(X)"),
    ],
)
def test_targets_of_more_dimensions_have_to_be_flattened(named, zoo: Zoo, task, as_inputs, call):
    X, y = as_inputs(zoo.X), np.zeros((len(zoo.X), 4, 3))
    y = None if isinstance(X, TensorDataset) else y
    starts = "Flatten" if task == "regression" else "For one label per pixel use task='classif"
    with pytest.raises(ValueError, match=rf"y has shape \({len(zoo.X)}, 4, 3\).*{starts}") as error:
        GreedySoup(task=task).fit(named, X, y)
    assert f"forward=lambda module, X: {call}.flatten(1)." in str(error.value)


def test_outputs_of_more_dimensions_have_to_be_flattened(zoo: Zoo):
    nets = [nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))) for _ in range(2)]
    y = np.random.default_rng(0).normal(size=(len(zoo.X), 6))
    soup = GreedySoup(task="regression")
    with pytest.raises(ValueError, match=r"X: module\(X\)\.flatten\(1\), and y with y\.reshape"):
        soup.fit(CheckpointCollection(nets), zoo.X, y)
    soup.set_params(forward=lambda module, X: module(X).flatten(1))
    assert soup.fit(CheckpointCollection(nets), zoo.X, y).predict(zoo.X).shape == y.shape


def test_class_weights_and_label_smoothing(named, zoo: Zoo):
    weight = torch.tensor([1.0, 5.0, 0.2])
    criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
    soup = PaperMEHL(max_epochs=2, random_state=0)
    by_instance = clone(soup).set_params(criterion=criterion).fit(named, zoo.X, zoo.y)

    def loss(output, y):
        return nn.functional.cross_entropy(output, y, weight=weight, label_smoothing=0.1)

    by_callable = clone(soup).set_params(criterion=loss).fit(named, zoo.X, zoo.y)
    assert np.array_equal(by_instance.coef_, by_callable.coef_)
    plain = clone(soup).fit(named, zoo.X, zoo.y)
    assert not np.allclose(plain.coef_, by_callable.coef_, atol=1e-3)


def test_a_search_takes_several_inputs(two, zoo: Zoo):
    _, X = two
    X = {"left": X["left"].astype(np.float64), "right": X["right"]}  # nets are given float32
    net = NeuralNetClassifier(
        Wrapped(), criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0, train_split=None
    )
    search = SoupSearchCV(net, {"lr": [0.01, 0.1]}, n_iter=2, random_state=0).fit(X, zoo.y)
    assert search.predict(X).shape == (60,)


class Wrapped(TwoInputs):
    """skorch wants a tensor."""

    def forward(self, left, right):
        return super().forward(left, right)["logits"]


class Overwriting(nn.Module):
    """Shifts and rectifies what it is given, where it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, X):
        return self.layer(X.sub_(0.5).relu_())


class Copying(Overwriting):
    def forward(self, X):
        return self.layer((X - 0.5).relu())


@every_soup
@pytest.mark.parametrize("batch_size", [25, None])
def test_modules_that_write_into_their_input(zoo: Zoo, soup, batch_size):
    torch.manual_seed(0)
    nets = around(Overwriting(), 4, spread=0.5)
    X = zoo.X.copy()
    fits = [
        clone(soup).set_params(batch_size=batch_size).fit(
            CheckpointCollection([net.state_dict() for net in nets], module=kind), X, zoo.y
        )
        for kind in (Overwriting, Copying)
    ]  # fmt: skip
    assert np.array_equal(X, zoo.X)
    assert np.array_equal(fits[0].coef_, fits[1].coef_)
    assert np.array_equal(fits[0].predict_proba(X), fits[1].predict_proba(X))
    assert np.array_equal(X, zoo.X)


def test_rows_in_bfloat16(zoo: Zoo):
    X = torch.as_tensor(zoo.X).bfloat16()
    soup = UniformSoup().fit(zoo.checkpoints, X, zoo.y)
    assert soup.score(X, zoo.y) == soup.score(X.float().numpy(), zoo.y)
