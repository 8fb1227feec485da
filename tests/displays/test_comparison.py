"""The scores that are drawn are those that were measured."""

from __future__ import annotations

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


def test_scores_that_do_not_fit_the_systems_are_refused():
    with pytest.raises(ValueError, match="expected a row for each of the 2 systems"):
        ComparisonDisplay(["a", "b"], [1.0])
