"""The losses that are drawn are those that were measured."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from sksoup import CheckpointCollection, UniformSoup
from sksoup.inspection import LossBarrierDisplay, loss_barrier

from ..zoo import Zoo


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_the_loss_barrier(zoo: Zoo):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    display = LossBarrierDisplay.from_estimator(soup, zoo.X, zoo.y, n_points=5, n_pairs=2)
    measured = loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_points=5, n_pairs=2)
    assert np.array_equal([line.get_ydata() for line in display.ax_.lines], measured.losses)
    assert f"{measured.barriers.max():.3f}" in display.ax_.get_title()
    assert len(display.ax_.get_legend().get_texts()) == 2


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
