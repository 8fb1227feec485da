"""Pictures: what is drawn is what was measured, and no labels overlap."""

from __future__ import annotations

import sys
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from sklearn.exceptions import NotFittedError
from torch import nn

from sksoup import CheckpointCollection, GreedySoup, LearnedSoup, MEHLSoup, UniformSoup
from sksoup.displays.pictures import LONGEST_LABEL, RED, shortened
from sksoup.inspection import (
    CoefficientsDisplay,
    ComparisonDisplay,
    GreedyPathDisplay,
    LearningCurveDisplay,
    LossBarrierDisplay,
    compare_soups,
    loss_barrier,
)

from ..zoo import Zoo

NAMES = {
    "short": "ft{:02d}".format,
    "long": "runs/a-very-long-experiment-name/{:03d}_weight-decay-0.0001_mixup".format,
    "various": lambda k: f"{'x' * (k % 40)}${k}_$",
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def boxes(ax, which):
    """Where the labels of an axis are, in pixels, from the first to the last."""
    ax.figure.canvas.draw()
    labels = ax.get_xticklabels() if which == "x" else ax.get_yticklabels()
    found = [label.get_window_extent() for label in labels if label.get_text()]
    return sorted((box.x0, box.x1) if which == "x" else (box.y0, box.y1) for box in found)


def assert_readable(display, *axes):
    figure, ax = display.figure_, display.ax_
    for which in axes:
        ends = boxes(ax, which)
        assert ends
        assert all(a[1] <= b[0] + 0.5 for a, b in pairwise(ends)), which
    inside = ax.get_window_extent()
    assert inside.width > 0.3 * figure.bbox.width  # the labels leave room
    assert inside.height > 0.3 * figure.bbox.height


@pytest.mark.parametrize("style", NAMES)
@pytest.mark.parametrize(("n", "n_layers"), [(3, 4), (24, 14), (72, 150), (200, 1)])
def test_labels_never_overlap(n, n_layers, style):
    names = [NAMES[style](k) for k in range(n)]
    layers = [f"encoder.layers.{k}.attention.self.query.weight" for k in range(n_layers)]
    coef = np.random.default_rng(0).normal(size=(n_layers, n))
    display = CoefficientsDisplay(coef, names, layers).plot()
    assert_readable(display, *("x" if n_layers == 1 else "xy"))
    tried = {"kept": False, "is_bound": True, "standard_error": None, "score": 0.5}
    path = [{"candidate": name, **tried, "kept": k == 0} for k, name in enumerate(names)]
    assert_readable(GreedyPathDisplay(path).plot(), "x")
    assert_readable(ComparisonDisplay(names[:30], np.ones(min(n, 30))).plot(), "y")


@given(st.lists(st.text("ab/._-", min_size=1, max_size=12), min_size=1, max_size=6, unique=True))
def test_shortened_names_stay_apart(names):
    short = shortened(names)
    assert len(set(short)) == len(names)
    assert all(text and text in name for text, name in zip(short, names, strict=True))


def test_shortened_names_lose_what_they_share():
    assert shortened(["runs/a/ft1.best", "runs/a/ft2.best"]) == ["ft1", "ft2"]
    assert shortened(["only"]) == ["only"]
    long = shortened(["x" * 60 + "1" * 40, "y" * 100])
    assert [len(text) for text in long] == [LONGEST_LABEL] * 2
    assert "…" in long[0]


def test_coefficients_of_every_kind_of_soup(zoo: Zoo):
    soup = MEHLSoup(layerwise=True, max_epochs=1, lr=0.3, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    display = CoefficientsDisplay.from_estimator(soup)
    image = display.ax_.images[0]
    assert np.array_equal(image.get_array(), soup.coef_)
    low, high = image.get_clim()
    assert low == -high == -np.abs(soup.coef_).max()  # 0 is white
    outside = ((soup.coef_ < 0) | (soup.coef_ > 1)).mean()
    display = CoefficientsDisplay.from_estimator(soup, kind="histogram")
    assert f"{100 * outside:.1f} % of {soup.coef_.size} outside" in display.ax_.get_title()
    assert sum(patch.get_height() for patch in display.ax_.patches[1:]) == soup.coef_.size
    scalar = MEHLSoup(max_epochs=1, lr=0.3, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    figure, ax = plt.subplots()
    display = CoefficientsDisplay.from_estimator(scalar, ax=ax)
    assert display.ax_ is ax
    assert display.figure_ is figure
    bars = display.ax_.patches
    assert np.allclose([bar.get_height() for bar in bars], scalar.coef_)
    is_red = [to_hex(bar.get_facecolor()).upper() == RED for bar in bars]
    assert is_red == ((scalar.coef_ < 0) | (scalar.coef_ > 1)).tolist()


def test_the_greedy_path(zoo: Zoo):
    soup = GreedySoup(batch_size=20).fit(zoo.checkpoints, zoo.X, zoo.y)
    display = GreedyPathDisplay.from_estimator(soup)
    drawn = {line.get_label(): line for line in display.ax_.lines}
    kept = [tried["score"] for tried in soup.path_ if tried["kept"]]
    assert drawn["kept"].get_ydata().tolist() == kept
    rest = sum(len(line.get_ydata()) for name, line in drawn.items() if name.startswith("left out"))
    assert rest == len(soup.path_) - len(kept)
    band = display.ax_.collections[0].get_paths()[0].get_extents()
    first = soup.path_[0]
    assert band.y0 <= first["score"] - first["standard_error"] + 1e-12
    with pytest.raises(NotFittedError):
        GreedyPathDisplay.from_estimator(GreedySoup())
    with pytest.raises(ValueError, match="path is empty"):
        GreedyPathDisplay([])


@pytest.mark.parametrize(
    "soup",
    [
        MEHLSoup(model_batch_size=3, max_epochs=2, batch_size=20, random_state=0),
        MEHLSoup(model_batch_size=3, max_epochs=2, validation_fraction=0.2, batch_size=10),
        LearnedSoup(max_epochs=3, batch_size=20, random_state=0),
    ],
)
def test_the_learning_curve(zoo: Zoo, soup):
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    display = LearningCurveDisplay.from_estimator(soup)
    for ax, what in ((display.ax_, "loss"), (display.score_ax_, "score")):
        steps = [step for record in soup.history_ for step in record[what]]
        assert ax.lines[0].get_ydata().tolist() == steps
        drawn = {line.get_label(): line for line in ax.lines}
        means = [np.mean(record[what]) for record in soup.history_]
        assert np.allclose(drawn[f"{what}, mean of an epoch"].get_ydata(), means)
    chosen = [line for line in display.ax_.lines if "set aside" in line.get_label()]
    wanted = [r["validation_loss"] for r in soup.history_ if "validation_loss" in r]
    assert [list(line.get_ydata()) for line in chosen] == ([wanted] if wanted else [])
    marks = [line for line in display.ax_.lines if line.get_linestyle() == "--"]
    n_outer = len({record.get("outer") for record in soup.history_})
    n_steps = sum(len(r["loss"]) for r in soup.history_ if r.get("outer", 0) == 0)
    assert [mark.get_xdata()[0] for mark in marks] == [n_steps * k - 0.5 for k in range(1, n_outer)]


def test_the_learning_curve_of_a_regression_has_no_scores():
    nets = [torch.nn.Linear(2, 1) for _ in range(3)]
    soup = LearnedSoup(nets, task="regression").fit(torch.randn(20, 2), torch.randn(20, 1))
    assert LearningCurveDisplay.from_estimator(soup).score_ax_ is None


def test_what_never_descended_has_no_curve(zoo: Zoo):
    with pytest.raises(ValueError, match="history holds no losses"):
        LearningCurveDisplay.from_estimator(UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y))


def test_the_loss_barrier(zoo: Zoo):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    display = LossBarrierDisplay.from_estimator(soup, zoo.X, zoo.y, n_points=5, n_pairs=2)
    measured = loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_points=5, n_pairs=2)
    assert np.array_equal([line.get_ydata() for line in display.ax_.lines], measured.losses)
    assert f"{measured.barriers.max():.3f}" in display.ax_.get_title()
    assert len(display.ax_.get_legend().get_texts()) == 2


def test_a_comparison(zoo: Zoo):
    systems = {"mean": UniformSoup(), "greedy": GreedySoup()}
    found = compare_soups(zoo.checkpoints, zoo.X, zoo.y, zoo.X, zoo.y, recipes=systems)
    display = ComparisonDisplay.from_comparison(found)
    held_out, test = (bars.lines[0].get_xdata() for bars in display.ax_.containers)
    assert held_out.tolist() == [result.held_out for result in found.results]
    assert test.tolist() == [result.test for result in found.results]
    without = compare_soups(zoo.checkpoints, zoo.X, zoo.y, recipes=systems)
    assert len(ComparisonDisplay.from_comparison(without).ax_.containers) == 1
    repeated = ComparisonDisplay(["a", "b"], [[1.0, 3.0], [2.0, 2.0]]).plot()
    assert repeated.ax_.containers[0].lines[0].get_xdata().tolist() == [2.0, 2.0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"coef has shape \(1, 2\), expected \(1, 3\)"):
        CoefficientsDisplay([1, 2], ["a", "b", "c"], ["all"])
    with pytest.raises(ValueError, match="kind must be 'map' or 'histogram', got 'pie'"):
        CoefficientsDisplay([1.0], ["a"], ["all"]).plot(kind="pie")
    with pytest.raises(ValueError, match="expected a row for each of the 2 systems"):
        ComparisonDisplay(["a", "b"], [1.0])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib, or the extra sksoup\[plot\]"):
        CoefficientsDisplay([1.0], ["a"], ["all"]).plot()


def test_the_barrier_is_measured_with_the_labels_of_the_soup():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(10 * torch.eye(2))

        def forward(self, X):
            return X @ self.scale

    checkpoints = CheckpointCollection([Logits(), Logits()], module=Logits)
    X, y = np.eye(2, dtype=np.float32), np.array(["yes", "no"])
    soup = UniformSoup(classes=["yes", "no"]).fit(checkpoints, X, y)
    assert soup.score(X, y) == 1
    display = LossBarrierDisplay.from_estimator(soup, X, y, n_points=3)
    assert display.barrier.losses.max() < 0.01
