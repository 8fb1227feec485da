"""Labels never overlap, and shortened names stay distinct."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksoup.displays.axes import LONGEST_LABEL, shortened
from sksoup.inspection import CoefficientsDisplay, ComparisonDisplay, GreedyPathDisplay

NAMES = {
    "short": "ft{:02d}".format,
    "long": "runs/a-very-long-experiment-name/{:03d}_weight-decay-0.0001_mixup".format,
    "various": lambda k: f"{'x' * (k % 40)}${k}_$",
}


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


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        ImportError, match=r"pip install matplotlib, or install the extra sksoup\[plot\]"
    ):
        CoefficientsDisplay([1.0], ["a"], ["all"]).plot()
