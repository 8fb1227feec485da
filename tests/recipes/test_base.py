"""The two forms of fit, labels and outputs, data of any kind, and what is refused."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    CheckpointError,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    SoupWarning,
    UniformSoup,
)

from ..zoo import Net, PaperMEHL, Zoo, around, make_states, same_tensors


class Counting(Net):
    """A net that counts the rows it sees."""

    rows = 0

    def forward(self, x):
        Counting.rows += len(x)
        return super().forward(x)


@pytest.fixture
def counted():
    Counting.rows = 0
    return CheckpointCollection(make_states(3, seed=0), module=Counting)


# ------------------------------------------------------------------------- two forms of fit


def test_scikit_learn_sees_the_second_form():
    assert list(inspect.signature(UniformSoup.fit).parameters) == [
        "self",
        "X",
        "y",
        "sample_weight",
    ]
    assert list(inspect.signature(UniformSoup().fit).parameters) == ["X", "y", "sample_weight"]


@pytest.mark.parametrize("given", ["collection", "list"])
@pytest.mark.parametrize(
    "call",
    [
        lambda soup, c, X, y: soup.fit(c, X, y),
        lambda soup, c, X, y: soup.fit(c, X, y=y),
        lambda soup, c, X, y: soup.fit(c, X=X, y=y),
        lambda soup, c, X, y: soup.fit(checkpoints=c, X=X, y=y),
        lambda soup, c, X, y: soup.fit(X, y, checkpoints=c),
        lambda soup, c, X, y: soup.set_params(checkpoints=c).fit(X, y),
        lambda soup, c, X, y: soup.set_params(checkpoints=c).fit(X, y=y),
        lambda soup, c, X, y: soup.set_params(checkpoints=c).fit(X=X, y=y),
        lambda soup, c, X, y: soup.set_params(checkpoints=lambda X, y: as_collection(c)).fit(X, y),
    ],
)
def test_every_way_to_call_fit(zoo: Zoo, call, given):
    checkpoints = zoo.checkpoints
    if given == "list":
        checkpoints = []
        for state in zoo.checkpoints.values():
            net = Net()
            net.load_state_dict(state)
            checkpoints.append(net)
    soup = call(UniformSoup(), checkpoints, zoo.X, zoo.y)
    assert same_tensors(
        soup.state_dict(), UniformSoup(zoo.checkpoints).fit(zoo.X, zoo.y).state_dict()
    )


def as_collection(checkpoints):
    if isinstance(checkpoints, CheckpointCollection):
        return checkpoints
    return CheckpointCollection(checkpoints)


def test_checkpoints_given_to_fit_are_not_kept_as_a_parameter(zoo: Zoo):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.checkpoints is None
    assert soup.checkpoints_ is zoo.checkpoints


def test_no_checkpoints_anywhere(zoo: Zoo):
    with pytest.raises(ValueError, match=r"UniformSoup has no checkpoints\. Pass them"):
        UniformSoup().fit(zoo.X, zoo.y)


def test_a_factory_that_makes_no_collection(zoo: Zoo):
    with pytest.raises(TypeError, match="returned a list, expected a CheckpointCollection"):
        UniformSoup(lambda X, y: []).fit(zoo.X, zoo.y)


@pytest.mark.parametrize(
    "stray",
    [
        ["a.safetensors", "b.safetensors"],
        "runs",
        [Net(), Net()],
        Net(),
        make_states(2, seed=0),
        make_states(1, seed=0)[0],
    ],
)
def test_checkpoints_where_x_should_be(stray, zoo: Zoo):
    with pytest.raises(TypeError, match="look like checkpoints"):
        UniformSoup(zoo.checkpoints).fit(stray, zoo.y)


# ---------------------------------------------------------------------- scikit-learn's tools


def test_pipeline_grid_search_and_cross_validation(zoo: Zoo):
    pipe = make_pipeline(FunctionTransformer(), GreedySoup(zoo.checkpoints)).fit(zoo.X, zoo.y)
    assert pipe.score(zoo.X, zoo.y) == GreedySoup(zoo.checkpoints).fit(zoo.X, zoo.y).score(
        zoo.X, zoo.y
    )
    soup = MEHLSoup(zoo.checkpoints, max_epochs=1, random_state=0)
    search = GridSearchCV(soup, {"layerwise": [False, True], "lr": [0.01, 0.1]}, cv=2)
    search.fit(zoo.X, zoo.y)
    assert search.best_estimator_.coef_.shape[-1] == len(zoo.checkpoints)
    search = GridSearchCV(
        UniformSoup(), {"checkpoints": [zoo.checkpoints, zoo.checkpoints.drop("checkpoint0")]}, cv=2
    ).fit(zoo.X, zoo.y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(cross_val_score(UniformSoup(zoo.checkpoints), zoo.X, zoo.y, cv=3)) == 3


def test_progress_goes_to_callbacks(zoo: Zoo):
    class Recorder:
        def __init__(self):
            self.events = []

        def setup(self, estimator, context):
            self.events.append("setup")

        def on_fit_task_begin(self, estimator, context):
            self.events.append(("begin", context.task_name))

        def on_fit_task_end(self, estimator, context):
            self.events.append(("end", context.task_name))

        def teardown(self, estimator, context):
            self.events.append("teardown")

    for soup, name, n in [
        (UniformSoup(), "average", 0),
        (GreedySoup(), "evaluation", 14),
        (BestCheckpoint(), "evaluation", 7),
        (LearnedSoup(max_epochs=3), "epoch", 3),
        (MEHLSoup(model_batch_size=3, max_epochs=2), "epoch", 6),
    ]:
        recorder = Recorder()
        soup.set_callbacks(recorder).fit(zoo.checkpoints, zoo.X, zoo.y)
        steps = [("begin", name), ("end", name)] * n
        expected = ["setup", ("begin", "fit"), *steps, ("end", "fit"), "teardown"]
        assert recorder.events == expected


def test_unfitted():
    for method in ("predict", "predict_proba"):
        with pytest.raises(NotFittedError):
            getattr(UniformSoup(), method)(np.ones((2, 4)))
    with pytest.raises(NotFittedError):
        UniformSoup().state_dict()


def test_tags_follow_the_task():
    assert is_classifier(UniformSoup())
    assert is_regressor(UniformSoup(task="regression"))
    assert not hasattr(UniformSoup(task="regression"), "predict_proba")


# ----------------------------------------------------------------------- labels and outputs


def test_string_labels_in_sorted_order(zoo: Zoo):
    labels = np.array(["ant", "bee", "cat"])
    soup = GreedySoup().fit(zoo.checkpoints, zoo.X, labels[zoo.y])
    plain = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.classes_.tolist() == labels.tolist()
    assert (soup.predict(zoo.X) == labels[plain.predict(zoo.X)]).all()


def test_labels_in_output_order(zoo: Zoo):
    order = ["cat", "ant", "bee"]
    soup = LearnedSoup(classes=order, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, np.array(order)[zoo.y])
    plain = LearnedSoup(random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert soup.classes_.tolist() == sorted(order)
    assert list(soup.recipe_.classes) == order
    assert soup.score(zoo.X, np.array(order)[zoo.y]) == plain.score(zoo.X, zoo.y)


def test_a_fold_that_lacks_a_class_changes_no_prediction(zoo: Zoo):
    some = zoo.y != 1
    whole = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    part = UniformSoup().fit(zoo.checkpoints, zoo.X[some], zoo.y[some])
    assert part.classes_.tolist() == [0, 1, 2]
    assert (part.predict(zoo.X) == whole.predict(zoo.X)).all()
    assert part.predict_proba(zoo.X).shape == (60, 3)


@pytest.mark.parametrize(
    ("classes", "make_y", "match"),
    [
        (None, lambda y: y + 5, None),  # three labels for three outputs: sorted
        (None, lambda y: y + (y == 2), None),
        (None, lambda y: np.where(y == 2, 7, 0), r"2 distinct labels \(0, 7\) for 3 outputs"),
        (None, lambda y: np.arange(len(y)) % 5, "5 distinct labels"),
        (None, lambda y: np.where(y == 2, "a", "b"), "2 distinct labels"),
        ([0, 1], lambda y: y, "classes must be 3 distinct labels"),
        ([0, 1, 1], lambda y: y, "classes must be 3 distinct labels"),
        ([0, 1, 5], lambda y: y, "not in classes: 2"),
    ],
)
def test_labels_that_can_not_be_the_outputs(counted, zoo: Zoo, classes, make_y, match):
    soup = BestCheckpoint(classes=classes)
    if match is None:
        soup.fit(counted, zoo.X, make_y(zoo.y))
    else:
        with pytest.raises(ValueError, match=match):
            soup.fit(counted, zoo.X, make_y(zoo.y))
        assert Counting.rows <= 1  # one row tells the number of outputs


# -------------------------------------------------------------------------------- tasks


def linear_zoo(n_outputs):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 4)).astype(np.float32)
    W = rng.normal(size=(n_outputs, 4)).astype(np.float32)
    states = [
        {
            "weight": torch.as_tensor(W + rng.normal(size=W.shape).astype(np.float32)),
            "bias": torch.zeros(n_outputs),
        }
        for _ in range(5)
    ]
    return CheckpointCollection(states, module=lambda: nn.Linear(4, n_outputs)), X, X @ W.T


@pytest.mark.parametrize("soup", [GreedySoup(), LearnedSoup(), PaperMEHL(random_state=0)])
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_regression(soup, n_outputs):
    checkpoints, X, y = linear_zoo(n_outputs)
    y = y[:, 0] if n_outputs == 1 else y
    soup = clone(soup).set_params(task="regression").fit(checkpoints, X, y)
    uniform = UniformSoup(task="regression").fit(checkpoints, X, y)
    assert soup.predict(X).shape == y.shape
    assert soup.predict(X).dtype == np.float32
    assert soup.score(X, y) > max(0.5, uniform.score(X, y) - 1e-6)


@pytest.mark.parametrize("soup", [GreedySoup(), LearnedSoup(), PaperMEHL(random_state=0)])
def test_multilabel(soup):
    checkpoints, X, scores = linear_zoo(3)
    y = (scores > 0).astype(int)
    soup = clone(soup).set_params(task="multilabel").fit(checkpoints, X, y)
    assert soup.predict(X).shape == y.shape
    assert set(np.unique(soup.predict(X))) <= {0, 1}
    assert (soup.predict(X) == (soup.predict_proba(X) > 0.5)).all()
    assert soup.score(X, y) > 0.3
    with pytest.raises(ValueError, match="only 0 and 1"):
        soup.fit(checkpoints, X, y * 2)


def test_targets_that_do_not_fit_the_outputs():
    checkpoints, X, y = linear_zoo(2)
    with pytest.raises(ValueError, match="y has 1 targets per row, expected 2"):
        UniformSoup(task="regression").fit(checkpoints, X, y[:, 0])


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.0),
        nn.functional.cross_entropy,
        lambda output, y: nn.functional.cross_entropy(output, y, reduction="none"),
    ],
)
def test_any_form_of_criterion_gives_the_same_soup(zoo: Zoo, criterion):
    default = LearnedSoup(random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    soup = LearnedSoup(criterion=criterion, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(soup.coef_, default.coef_, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [2.0**-70, 2.0**-1000, 2.0**100, 2.0**1000])
def test_only_ratios_of_sample_weight_count(zoo: Zoo, factor):
    weight = np.linspace(0.1, 1, len(zoo.y))
    soups = [
        MEHLSoup(max_epochs=2, random_state=0).fit(
            zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight * each
        )
        for each in (1.0, factor)
    ]
    assert np.array_equal(soups[0].coef_, soups[1].coef_)


def test_sample_weight_in_the_loss(zoo: Zoo):
    """A row of weight 2 is the row twice, with the whole data in one batch."""
    weight = 1.0 + (np.arange(60) < 20)
    twice = np.r_[np.arange(60), np.arange(20)]
    settings = {"batch_size": None, "random_state": 0, "max_epochs": 3}
    weighted = LearnedSoup(**settings).fit(zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight)
    repeated = LearnedSoup(**settings).fit(zoo.checkpoints, zoo.X[twice], zoo.y[twice])
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs one loss per row"):
        LearnedSoup(criterion=nn.functional.cross_entropy).fit(
            zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight
        )


@pytest.mark.parametrize("wrap", [tuple, lambda out: {"logits": out[0]}, "object"])
def test_outputs_of_other_shapes(zoo: Zoo, wrap):
    class Wrapped(Net):
        def forward(self, x):
            output = super().forward(x)
            if wrap == "object":
                return type("Output", (), {"logits": output})()
            return wrap([output])

    checkpoints = CheckpointCollection(make_states(3, seed=0), module=Wrapped)
    plain = CheckpointCollection(make_states(3, seed=0), module=Net)
    got = UniformSoup().fit(checkpoints, zoo.X, zoo.y).predict_proba(zoo.X)
    assert np.array_equal(got, UniformSoup().fit(plain, zoo.X, zoo.y).predict_proba(zoo.X))


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        (lambda out: "text", TypeError, "returned a str, expected a tensor"),
        (lambda out: out[:, 0], ValueError, r"shape \(1,\) for one row"),
        (lambda out: out[..., None], ValueError, r"shape \(1, 3, 1\) for one row"),
    ],
)
def test_outputs_that_are_none(zoo: Zoo, output, error, match):
    class Odd(Net):
        def forward(self, x):
            return output(super().forward(x))

    checkpoints = CheckpointCollection(make_states(3, seed=0), module=Odd)
    with pytest.raises(error, match=match):
        UniformSoup().fit(checkpoints, zoo.X, zoo.y)


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_inputs_the_module_can_not_take(zoo: Zoo, dtype):
    X = np.ones((60, 5 if dtype == np.float32 else 4), dtype=dtype)
    with pytest.raises(ValueError, match=r"does not accept X: with one row of shape \(1, [45]\)"):
        UniformSoup().fit(zoo.checkpoints, X, zoo.y)


@pytest.mark.parametrize("kind", [AttributeError, KeyError, AssertionError, ArithmeticError])
def test_a_forward_pass_that_fails_for_one_row_in_any_way(zoo: Zoo, kind):
    def forward(module, X):
        raise kind("per_layer_config")

    with pytest.raises(ValueError, match=f"does not accept X: .*{kind.__name__}: .*per_layer"):
        UniformSoup(forward=forward).fit(zoo.checkpoints, zoo.X, zoo.y)


def test_integer_inputs_stay_integers(zoo: Zoo):
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    torch.manual_seed(0)
    checkpoints = CheckpointCollection(around(Embedded(), 3))
    tokens = np.arange(60 * 5).reshape(60, 5) % 10
    soup = MEHLSoup(layerwise=True, random_state=0).fit(checkpoints, tokens, zoo.y)
    assert soup.predict(torch.as_tensor(tokens)).shape == (60,)


def test_images(zoo: Zoo):
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    checkpoints = CheckpointCollection([module], module=module)
    X = np.random.default_rng(0).normal(size=(60, 1, 4, 4))
    assert UniformSoup().fit(checkpoints, X, zoo.y).predict(X).shape == (60,)


def test_float64_checkpoints_are_computed_in_float64(zoo64: Zoo):
    soup = UniformSoup().fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    assert next(soup.module_.parameters()).dtype == torch.float64
    assert soup.state_dict()["head.weight"].dtype == torch.float64


# ---------------------------------------------- bad input, before the data meets the module


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda X, y: (X[:-1], y), "inconsistent numbers of samples"),
        (lambda X, y: (X, None), "requires y to be passed"),
        (lambda X, y: (np.where(X > 2, np.nan, X), y), "contains NaN"),
        (lambda X, y: (X[:0], y[:0]), "0 sample"),
        (lambda X, y: (X[:, 0], y), "Expected 2D array"),
    ],
)
def test_bad_data(counted, zoo: Zoo, make, match):
    with pytest.raises(ValueError, match=match):
        UniformSoup().fit(counted, *make(zoo.X, zoo.y))
    assert Counting.rows == 0


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (np.ones(3), r"shape \(3,\), expected \(60,\)"),
        (-np.ones(60), "not negative"),
        (np.zeros(60), "zero everywhere"),
        (np.full(60, np.nan), "finite"),
    ],
)
def test_bad_sample_weight(counted, zoo: Zoo, weight, match):
    with pytest.raises(ValueError, match=match):
        UniformSoup().fit(counted, zoo.X, zoo.y, sample_weight=weight)
    assert Counting.rows == 0


@pytest.mark.parametrize(
    ("soup", "passes"),
    [(UniformSoup(), 0), (BestCheckpoint(), 0), (LearnedSoup(), 0), (MEHLSoup(), 0),
     (GreedySoup(), 2), (GreedySoup(n_jobs=2), 0)],
)  # fmt: skip
def test_nan_weights_are_found_before_held_out_rows_meet_them(soup, passes, zoo: Zoo):
    """Greedy-Soup, in one process, reads each file as it ranks it: those before it are scored."""
    states = make_states(3, seed=0)
    states[2]["head.bias"][0] = float("nan")
    Counting.rows = 0
    checkpoints = CheckpointCollection(states, module=Counting)
    with pytest.raises(CheckpointError, match=r"checkpoint 2 .*'head\.bias' holds NaN"):
        clone(soup).fit(checkpoints, zoo.X, zoo.y)
    assert Counting.rows <= 1 + passes * len(zoo.X)  # one row tells the number of outputs


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (lambda: nn.Linear(4, 3), r"has 'weight', 'bias' and it lacks 'hidden\.weight'"),
        (
            lambda: nn.ModuleDict(
                {"hidden": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 5)}
            ),
            r"'head\.weight' has shape \(5, 6\) in the module, but \(3, 6\) in the checkpoints",
        ),
    ],
)
def test_a_module_that_does_not_fit(zoo: Zoo, module, match):
    checkpoints = CheckpointCollection(make_states(2, seed=0), module=module)
    with pytest.raises(CheckpointError, match=match):
        UniformSoup().fit(checkpoints, zoo.X, zoo.y)


def test_a_module_with_other_kinds(zoo: Zoo):
    class Whole(Net):
        def __init__(self):
            super().__init__()
            self.norm.register_buffer("num_batches_tracked", torch.tensor(0.0))

    checkpoints = CheckpointCollection(make_states(2, seed=0), module=Whole)
    with pytest.raises(CheckpointError, match=r"'norm\.num_batches_tracked' has dtype"):
        UniformSoup().fit(checkpoints, zoo.X, zoo.y)


def test_predicting_with_another_number_of_features(zoo: Zoo):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match="X has 3 features, but UniformSoup is expecting 4"):
        soup.predict(zoo.X[:, :3])


def test_devices(zoo: Zoo):
    assert next(UniformSoup(device="cpu").fit(
        zoo.checkpoints, zoo.X, zoo.y).module_.parameters()).device.type == "cpu"  # fmt: skip
    with pytest.raises(RuntimeError):
        UniformSoup(device="nowhere").fit(zoo.checkpoints, zoo.X, zoo.y)


# ------------------------------------------------------------------------ what is easily mistaken


def test_checkpoints_where_y_should_be(zoo: Zoo):
    for stray in (zoo.checkpoints, [Net(), Net()], Net(), [Path("runs/a.pt")]):
        with pytest.raises(
            TypeError, match=r"y is or contains a \w+, .*fit\(checkpoints, X, y\)"
        ) as e:
            UniformSoup().fit(zoo.X, zoo.y, stray)
        assert len(str(e.value)) < 200  # no labels are printed
        with pytest.raises(TypeError, match="The checkpoints are the first argument"):
            UniformSoup().fit(zoo.X, stray)


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_tokens_without_targets(zoo: Zoo, kind):
    tokens = {name: torch.ones(8, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    X = {name: part if kind is torch.Tensor else part.numpy() for name, part in tokens.items()}
    message = r"X has the inputs 'input_ids', 'attention_mask' with 8 rows, .*Pass y.*'labels'"
    with pytest.raises(ValueError, match=message):
        UniformSoup(zoo.checkpoints).fit(X)
    with pytest.raises(TypeError, match=r"a state dict.* look like checkpoints"):
        UniformSoup(zoo.checkpoints).fit({"weight": torch.ones(3, 4), "bias": torch.ones(3)})


@pytest.mark.parametrize("soup", [UniformSoup(), BestCheckpoint(), GreedySoup(), MEHLSoup()])
def test_one_checkpoint_is_said(zoo: Zoo, soup):
    one = zoo.checkpoints.select(["checkpoint3"])
    with pytest.warns(SoupWarning, match="one checkpoint only, 'checkpoint3'") as caught:
        soup.fit(one, zoo.X, zoo.y)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", SoupWarning)
        CheckpointEnsemble().fit(one, zoo.X, zoo.y)


@pytest.mark.parametrize("kind", [MEHLSoup, LearnedSoup])
def test_a_learning_rate_out_of_all_proportion_is_said(zoo: Zoo, kind):
    soup = kind(lr=5, max_epochs=1, random_state=0)
    with pytest.warns(SoupWarning, match=r"lr=5 is the step length.*values are 0\.01 to 0\.1"):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    for settings in ({"lr": 1.0}, {"lr": 5, "optimizer": "sgd"}):
        soup.set_params(**settings).fit(zoo.checkpoints, zoo.X, zoo.y)
        assert not any("lr=" in said for said in soup.warnings_)
