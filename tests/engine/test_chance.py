"""Scores no better than chance are noticed, on rows that are enough to be certain."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, MEHLSoup, SoupWarning

KINDS = pytest.mark.parametrize("kind", [BestCheckpoint, GreedySoup])
GUESS = "No checkpoint is better than chance"


class Same(nn.Module):
    """Its outputs are its inputs, nearly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def nets() -> CheckpointCollection:
    states = [{"scale": torch.tensor([1 + 0.1 * k])} for k in range(3)]
    return CheckpointCollection(states, module=Same)


def one_hot(classes, n_classes: int = 3) -> torch.Tensor:
    return torch.eye(n_classes)[torch.as_tensor(classes)]


def fit_silently(soup, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        warnings.filterwarnings("error", "No checkpoint", SoupWarning)
        return soup.fit(*args, **kwargs)


@KINDS
def test_labels_in_another_order(kind):
    y = np.arange(120) % 3
    labels = np.array(["b", "c", "a"])[y]  # of outputs 0, 1, 2; sorted, they would be a, b, c
    with pytest.warns(
        SoupWarning, match=rf"{GUESS}.*0\.0000 \('checkpoint0'\).*classes=\["
    ) as caught:
        soup = kind().fit(nets(), one_hot(y), labels)
    assert len(caught) == len(soup.warnings_) == 1
    assert caught[0].filename == __file__
    fit_silently(kind(classes=["b", "c", "a"]), nets(), one_hot(y), labels)


@KINDS
def test_few_rows_and_known_scores_and_other_metrics_are_not_judged(kind):
    y = np.arange(120) % 3
    wrong = (y + 1) % 3
    fit_silently(kind(), nets(), one_hot(y[:88]), wrong[:88])
    weight = np.where(np.arange(120) < 88, 1.0, 1e-6)  # as few as 88 rows
    fit_silently(kind(), nets(), one_hot(y), wrong, sample_weight=weight)
    fit_silently(kind(scoring="f1_macro"), nets(), one_hot(y), wrong)
    known = CheckpointCollection(nets(), scores=dict.fromkeys(nets(), 0.0))
    fit_silently(kind(), known, one_hot(y), wrong)
    with pytest.warns(SoupWarning, match=GUESS):
        kind().fit(nets(), one_hot(y[:89]), wrong[:89])


@pytest.mark.parametrize(("n_classes", "n"), [(2, 100), (3, 89), (10, 36), (40, 30)])
def test_how_many_rows_are_certain(n_classes, n):
    y = np.arange(n) % min(n_classes, 10)
    for rows in (slice(n - 1), slice(n)):
        X, wrong = one_hot(y[rows], n_classes), (y[rows] + 1) % n_classes
        if rows.stop == n:
            with pytest.warns(SoupWarning, match=GUESS):
                BestCheckpoint(classes=range(n_classes)).fit(nets(), X, wrong)
        else:
            fit_silently(BestCheckpoint(classes=range(n_classes)), nets(), X, wrong)


def test_rows_that_rank_are_those_that_count():
    y = np.arange(210) % 3
    soup = GreedySoup(ranking_fraction=0.4, random_state=0)
    fit_silently(soup, nets(), one_hot(y), (y + 1) % 3)
    with pytest.warns(SoupWarning, match=GUESS):
        GreedySoup(ranking_fraction=0.6, random_state=0).fit(nets(), one_hot(y), (y + 1) % 3)


@pytest.mark.parametrize(("share_right", "warns"), [(0.6, True), (0.78, False), (0.9, False)])
def test_below_the_share_of_the_most_frequent_class(share_right, warns):
    y = (np.arange(200) >= 160).astype(int)  # four fifths are of class 0
    outputs = np.where(np.arange(200) % 100 < 100 * share_right, y, 1 - y)
    X = one_hot(outputs, 2)
    if not warns:
        fit_silently(BestCheckpoint(), nets(), X, y)
        return
    with pytest.warns(SoupWarning, match=r"most frequent class alone is 0\.8000"):
        BestCheckpoint().fit(nets(), X, y)


def test_weights_change_which_class_is_most_frequent():
    y = np.arange(400) % 2
    outputs = np.where(np.arange(400) % 20 < 14, y, 1 - y)
    X = one_hot(outputs, 2)
    fit_silently(BestCheckpoint(), nets(), X, y)  # 0.7 of two classes
    with pytest.warns(SoupWarning, match=r"most frequent class alone is 0\.9000"):
        BestCheckpoint().fit(nets(), X, y, sample_weight=np.where(y == 0, 9.0, 1.0))


@KINDS
def test_dense_labels_of_which_some_are_left_out(kind):
    y = np.arange(100 * 6).reshape(100, 6) % 3
    X = one_hot(y).movedim(-1, 1)  # (100, 3, 6)
    left_out = np.where(np.arange(6) % 2, -100, y)
    fit_silently(kind(), nets(), X, left_out)
    permuted = np.where(left_out == -100, -100, (y + 1) % 3)
    with pytest.warns(SoupWarning, match=GUESS):
        kind().fit(nets(), X, permuted)


def test_labels_that_are_left_out_are_no_class():
    """Right on 0.7 of two classes, where five of six positions have none."""
    y = np.full((200, 6), -100)
    y[:, 2] = np.arange(200) % 2
    outputs = np.where(np.arange(200) % 20 < 14, y[:, 2], 1 - y[:, 2])
    X = one_hot(np.repeat(outputs[:, None], 6, axis=1), 2).movedim(-1, 1)
    fit_silently(BestCheckpoint(), nets(), X, y)


@KINDS
def test_targets_of_another_scale(kind):
    x = torch.linspace(-1, 1, 120)[:, None]
    fit_silently(kind(task="regression"), nets(), x, x[:, 0].numpy())
    with pytest.warns(SoupWarning, match=r"highest R² is -.*scale of y may differ"):
        kind(task="regression").fit(nets(), x, 50 + 10 * x[:, 0].numpy())
    fit_silently(kind(task="regression"), nets(), x[:99], 50 + x[:99, 0].numpy())


@pytest.mark.parametrize("kind", [BestCheckpoint, GreedySoup, MEHLSoup])
def test_few_rows_are_said(kind):
    y = np.arange(30) % 3
    match = (
        r"Only 5 held-out rows for selecting among 3 checkpoints.*up to 0\.22\. Hold out 30 or more"
    )
    with pytest.warns(SoupWarning, match=match) as caught:
        soup = kind(classes=[0, 1, 2]).fit(nets(), one_hot(y[:5]), y[:5])
    assert sum("held-out rows for selecting" in said for said in soup.warnings_) == 1
    assert caught[0].filename == __file__
    with pytest.warns(SoupWarning, match="Only 29 held-out rows"):
        kind().fit(nets(), one_hot(y[:29]), y[:29])
    with pytest.warns(SoupWarning, match="Only 5 held-out rows"):
        kind().fit(nets(), one_hot(y), y, sample_weight=np.where(np.arange(30) < 5, 1.0, 1e-6))
    assert kind().fit(nets(), one_hot(y), y).warnings_ == ()
