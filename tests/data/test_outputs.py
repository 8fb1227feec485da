"""What outputs mean: labels to targets and back, for any labels in any order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, r2_score

from sksoup.data.outputs import IGNORED, Outputs
from sksoup.data.rows import HeldOut

CPU = torch.device("cpu")
labels = st.one_of(
    st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True),
    st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=2, max_size=6, unique=True),
)


@given(classes=labels, seed=st.integers(0, 99), data=st.data())
def test_the_label_of_a_target_is_the_label(classes, seed, data):
    y = np.array(data.draw(st.lists(st.sampled_from(classes), min_size=1, max_size=20)))
    outputs = Outputs.of(torch.zeros(1, len(classes)), y, "classification", classes)
    targets = outputs.encode(y, torch.float32, CPU)
    assert outputs.classes.tolist() == classes  # as given, not sorted
    logits = torch.nn.functional.one_hot(targets, len(classes)).float()
    assert outputs.decode(logits).tolist() == y.tolist()
    assert outputs.score(y, outputs.decode(logits)) == 1.0
    assert outputs.counted(targets) is None
    assert float(outputs.probabilities(5 * logits).sum()) == pytest.approx(len(y))


@given(seed=st.integers(0, 99), weighted=st.booleans())
def test_the_share_of_right_rows_is_the_accuracy(seed, weighted):
    rng = np.random.default_rng(seed)
    y, logits = rng.integers(0, 3, 9), torch.as_tensor(rng.normal(size=(9, 3)))
    weight = rng.uniform(0.1, 2, 9) if weighted else None
    outputs = Outputs.of(logits[:1], y, "classification", [0, 1, 2])
    targets = outputs.encode(y, torch.float64, CPU)
    rows = HeldOut(logits, targets, None if weight is None else torch.as_tensor(weight))
    (batch,) = rows.batches(None)
    expected = accuracy_score(y, outputs.decode(logits), sample_weight=weight)
    assert float(outputs.right(logits, batch)) == pytest.approx(expected)
    assert outputs.score(y, outputs.decode(logits), weight) == pytest.approx(expected)


def test_positions_without_a_label_count_for_nothing():
    y = np.array([[0, 1, IGNORED], [IGNORED, IGNORED, 2]])
    criterion = torch.nn.CrossEntropyLoss(ignore_index=-1)
    outputs = Outputs.of(torch.zeros(1, 3, 3), y, "classification", None, criterion)
    targets = outputs.encode(y, torch.float32, CPU)
    assert targets.tolist() == [[0, 1, IGNORED], [IGNORED, IGNORED, 2]]
    assert outputs.for_criterion(targets).tolist() == [[0, 1, -1], [-1, -1, 2]]
    assert outputs.counted(targets).tolist() == [2, 1]
    wrong = np.where(y == IGNORED, 0, y)
    assert outputs.score(y, wrong) == 1.0
    assert outputs.score(y, np.array([[0, 0, 0], [0, 0, 2]]), [1.0, 2.0]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("shape", "y", "message"),
    [
        ((1, 1), np.arange(9), "but y has 9.* or task='regression' if y holds numbers"),
        ((1, 3), np.eye(3, dtype=int), "several labels, pass task='multilabel'"),
        ((1, 3), np.arange(9).reshape(3, 3), "several numbers to predict, pass task='regression'"),
        ((1,), np.eye(3, dtype=int), "several labels, pass task='multilabel'"),
    ],
)
def test_errors_name_a_task_that_was_forgotten(shape, y, message):
    with pytest.raises(ValueError, match=message):
        Outputs.of(torch.zeros(shape), y, "classification")


def test_one_logit_is_two_outputs():
    y = np.array(["no", "yes", "no"])
    outputs = Outputs.of(torch.zeros(1, 1), y, "classification")
    assert (outputs.one_logit, outputs.n_outputs) == (True, 2)
    logits = torch.tensor([[0.0, -1.0], [0.0, 2.0], [0.0, 0.5]])  # 0 and z
    assert outputs.decode(logits).tolist() == ["no", "yes", "yes"]


@pytest.mark.parametrize("column", [True, False])
def test_targets_of_a_regression_keep_their_shape(column):
    y = np.array([1.0, 2.0, 4.0]) if column else np.array([[1.0], [2.0], [4.0]])
    outputs = Outputs.of(torch.zeros(1, 1), y, "regression")
    targets = outputs.encode(y, torch.float32, CPU)
    assert targets.shape == (3, 1)
    assert outputs.decode(targets).shape == y.shape
    assert outputs.score(y, y + 0.5) == r2_score(y, y + 0.5)


def test_several_labels_are_signs():
    y = np.array([[0, 1], [1, 1]])
    outputs = Outputs.of(torch.zeros(1, 2), y, "multilabel")
    logits = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    assert outputs.decode(logits).tolist() == [[0, 1], [1, 0]]
    assert outputs.score(y, outputs.decode(logits)) == 0.5
    torch.testing.assert_close(outputs.probabilities(logits), logits.sigmoid())


def net(names):
    """A module whose config names its outputs, as those of transformers."""
    return SimpleNamespace(config=SimpleNamespace(id2label=names))


REVIEWS = net({0: "positive", 1: "neutral", 2: "negative"})


@pytest.mark.parametrize("kind", [None, object])
def test_texts_are_matched_by_the_names_of_the_outputs(kind):
    y = np.array(["negative", "positive", "negative"], dtype=kind)
    outputs = Outputs.of(torch.zeros(1, 3), y, "classification", module=REVIEWS)
    assert outputs.classes.tolist() == ["positive", "neutral", "negative"]
    targets = outputs.encode(y, torch.float32, CPU)
    assert targets.tolist() == [2, 0, 2]
    assert outputs.decode(torch.eye(3)).tolist() == ["positive", "neutral", "negative"]
    assert list(outputs.described) == ["positive", "neutral", "negative"]


def test_classes_come_before_names_and_numbers_stay():
    y = np.array(["negative", "neutral", "positive"])
    order = ["neutral", "negative", "positive"]
    outputs = Outputs.of(torch.zeros(1, 3), y, "classification", order, module=REVIEWS)
    assert outputs.classes.tolist() == list(outputs.described) == order
    numbers = Outputs.of(torch.zeros(1, 3), np.array([2, 0]), "classification", module=REVIEWS)
    assert numbers.classes.tolist() == [0, 1, 2]
    assert numbers.described == ("positive", "neutral", "negative")
    others = Outputs.of(torch.zeros(1, 3), np.array([7, 5, 3]), "classification", module=REVIEWS)
    assert list(others.described) == [3, 5, 7]
    regression = Outputs.of(torch.zeros(1, 1), np.ones(3), "regression", module=REVIEWS)
    assert regression.described == ()


STARS = net({k: str(k + 1) for k in range(5)})


@pytest.mark.parametrize("y", [[1, 2, 3, 4], [2, 4], [1, 2, 3, 4, 5], [5]])
def test_numbers_that_name_the_outputs_are_not_shifted(y):
    outputs = Outputs.of(torch.zeros(1, 5), np.array(y), "classification", module=STARS)
    assert outputs.classes.tolist() == [1, 2, 3, 4, 5]
    backwards = net({k: str(5 - k) for k in range(5)})
    outputs = Outputs.of(torch.zeros(1, 5), np.array(y), "classification", module=backwards)
    assert outputs.classes.tolist() == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("y", [[0, 1, 2, 3, 4], [0, 3]])
def test_numbers_that_name_other_labels_are_indices(y):
    outputs = Outputs.of(torch.zeros(1, 5), np.array(y), "classification", module=STARS)
    assert outputs.classes.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "names",
    [
        {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},  # made up
        {0: "a", 1: "b"}, {0: "a", 1: "b", 3: "c"}, {0: "a", 1: "a", 2: "b"}, {0: 0, 1: 1, 2: 2},
        {}, None, ["a", "b", "c"],
    ],
)  # fmt: skip
def test_what_names_no_outputs_is_left_aside(names):
    y = np.array(["x", "z", "y"])
    outputs = Outputs.of(torch.zeros(1, 3), y, "classification", module=net(names))
    assert outputs.classes.tolist() == ["x", "y", "z"]
    numbers = Outputs.of(torch.zeros(1, 3), np.arange(3), "classification", module=net(names))
    assert list(numbers.described) == [0, 1, 2]


def test_labels_that_are_no_names_are_an_error_with_both():
    y = np.array(["negative", "Positive", "meh"])
    match = (
        r"not names of the module's outputs: 'Positive', 'meh'\. Its config \(id2label\) has "
        r"'positive', 'neutral', 'negative'\. Use these names in y, or .* classes="
    )
    with pytest.raises(ValueError, match=match):
        Outputs.of(torch.zeros(1, 3), y, "classification", module=REVIEWS)
