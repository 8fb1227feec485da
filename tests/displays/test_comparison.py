"""The scores that are drawn are those that were measured."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sksoup import GreedySoup, UniformSoup
from sksoup.inspection import ComparisonDisplay, compare_soups

from ..zoo import Zoo


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


def test_differences_are_drawn_by_what_they_mean():
    low_high = [(np.nan, np.nan), (0.1, 0.3), (-0.1, 0.2), (-0.5, -0.1)]
    display = ComparisonDisplay(
        ["best", "up", "level", "down"], [0.8] * 4, [0.8] * 4,
        differences=[np.nan, 0.2, 0.05, -0.3], intervals=low_high,
    ).plot()  # fmt: skip
    drawn = {bars.get_label(): bars for bars in display.difference_ax_.containers}
    assert list(drawn) == ["better", "interval contains 0", "worse"]
    for (label, bars), (row, low, high) in zip(
        drawn.items(), [(1, 0.1, 0.3), (2, -0.1, 0.2), (3, -0.5, -0.1)], strict=True
    ):
        assert bars.lines[0].get_ydata().tolist() == [row], label
        (segment,) = bars.lines[2][0].get_segments()
        assert segment[:, 0] == pytest.approx([low, high])
    given = plt.subplots()[1]
    one = ComparisonDisplay(["a"], [0.5], differences=[0.1]).plot(ax=given)
    assert one.ax_ is given
    assert one.difference_ax_ is None
    unknown = ComparisonDisplay(["a"], [0.5], differences=[0.1]).plot()  # without an interval
    assert [b.get_label() for b in unknown.difference_ax_.containers] == ["interval contains 0"]
    with pytest.raises(ValueError, match=r"intervals has shape \(1,\), expected \(1, 2\)"):
        ComparisonDisplay(["a"], [0.5], differences=[0.1], intervals=[0.1])


def test_twelve_labels_do_not_overlap():
    names = [f"A method with a long name {k}" for k in range(12)]
    scores = np.linspace(0.5, 0.6, 12)
    gains = np.linspace(-0.015, 0.026, 12)
    intervals = np.stack([gains - 0.001, gains + 0.001], axis=1)
    display = ComparisonDisplay(
        names, scores, scores, differences=gains, intervals=intervals
    ).plot()
    display.figure_.canvas.draw()
    boxes = [label.get_window_extent() for label in display.ax_.get_yticklabels()]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    numbers = display.difference_ax_.get_xticklabels()
    boxes = [number.get_window_extent() for number in numbers if number.get_text()]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_scores_that_do_not_fit_the_systems_are_refused():
    with pytest.raises(ValueError, match="expected a row for each of the 2 systems"):
        ComparisonDisplay(["a", "b"], [1.0])
