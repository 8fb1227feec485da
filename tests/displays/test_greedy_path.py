"""The path that is drawn is that of the greedy soup."""

from __future__ import annotations

import pytest
from sklearn.exceptions import NotFittedError

from sksoup import GreedySoup
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
