"""The curve that is drawn is the history of the search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sksoup import LearnedSoup, MEHLSoup, UniformSoup
from sksoup.inspection import LearningCurveDisplay

from ..zoo import Zoo


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
    with pytest.raises(ValueError, match="history has no losses"):
        LearningCurveDisplay.from_estimator(UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y))
