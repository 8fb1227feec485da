"""The path that is drawn is that of the greedy soup."""

from __future__ import annotations

import pytest
from sklearn.exceptions import NotFittedError

from sksoup import GreedySoup, PrunedSoup
from sksoup.inspection import GreedyPathDisplay

from ..zoo import Zoo


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


def test_the_path_of_a_pruned_soup(zoo: Zoo):
    soup = PrunedSoup(batch_size=20).fit(zoo.checkpoints, zoo.X, zoo.y)
    display = GreedyPathDisplay.from_estimator(soup)
    drawn = {line.get_label(): line.get_ydata().tolist() for line in display.ax_.lines}
    dropped = [tried["score"] for tried in soup.path_ if tried["dropped"]]
    assert dropped
    assert drawn["dropped"] == dropped
    rest = sum(len(scores) for label, scores in drawn.items() if label.startswith("kept"))
    assert rest == len(soup.path_) - len(dropped) - 1
    assert display.ax_.get_xticklabels()[0].get_text() == "all"
    assert display.ax_.get_ylabel() == "held-out score without it"
