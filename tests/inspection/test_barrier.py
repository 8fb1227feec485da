from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from sksoup import CheckpointCollection
from sksoup.inspection import LossBarrier, loss_barrier

from ..zoo import Zoo


def test_losses_are_those_of_a_plain_walk(zoo: Zoo):
    checkpoints = zoo.checkpoints.select(zoo.checkpoints.names[:3])
    found = loss_barrier(checkpoints, zoo.X, zoo.y, n_points=4, batch_size=7)
    a, b, c = checkpoints.names
    assert found.lines == ((a, b), (a, c), (b, c), (a, "mean"), (b, "mean"), (c, "mean"))
    states = {name: checkpoints[name] for name in checkpoints}
    states["mean"] = {
        n: sum(s[n] for s in states.values()) / 3 if v.is_floating_point() else v
        for n, v in states[a].items()
    }
    module = checkpoints.build_module().eval()
    for (first, last), losses in zip(found.lines, found.losses, strict=True):
        for t, loss in zip(found.alpha, losses, strict=True):
            module.load_state_dict(
                {
                    n: (1 - t) * v + t * states[last][n] if v.is_floating_point() else v
                    for n, v in states[first].items()
                }
            )
            with torch.no_grad():
                expected = cross_entropy(module(torch.as_tensor(zoo.X)), torch.as_tensor(zoo.y))
            assert loss == pytest.approx(float(expected), rel=1e-4)


def test_a_convex_loss_has_no_barrier_and_units_that_were_permuted_have_one():
    torch.manual_seed(0)
    X, y = torch.randn(50, 3), torch.randn(50)
    linear = CheckpointCollection([nn.Linear(3, 1) for _ in range(3)])
    assert (loss_barrier(linear, X, y, task="regression").barriers <= 1e-6).all()

    def net(order):
        module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=rng))
            module[0].weight.copy_(module[0].weight[order])
            module[0].bias.copy_(module[0].bias[order])
            module[2].weight.copy_(module[2].weight[:, order])
        return module

    first, second = net(list(range(8))), net([7, 6, 5, 4, 3, 2, 1, 0])
    y = first(X).detach().squeeze(1)
    assert mse_loss(second(X).squeeze(1), y) < 1e-8  # the same function
    found = loss_barrier(CheckpointCollection([first, second]), X, y, task="regression", n_points=3)
    assert found.barriers[0] > 0.1
    assert "checkpoint0 - checkpoint1" in str(found)


def test_pairs_are_drawn_and_reproducible(zoo: Zoo):
    few = loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_points=2, n_pairs=4)
    assert len(few.lines) == 4 + len(zoo.checkpoints)
    again = loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_points=2, n_pairs=4)
    assert few.lines == again.lines
    assert np.array_equal(few.losses, again.losses)
    every = loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_points=2, n_pairs=None)
    assert len(every.lines) == 7 * 6 / 2 + 7


def test_bad_arguments(zoo: Zoo):
    with pytest.raises(ValueError, match="n_points == 1, must be >= 2"):
        loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_points=1)
    with pytest.raises(ValueError, match="n_pairs == -1, must be >= 0"):
        loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_pairs=-1)


def test_weights_of_rows_do_not_matter_to_the_shape_of_the_result():
    assert LossBarrier((("a", "b"),), np.array([0, 1]), np.array([[2.0, 3.0]])).barriers == [0]


def test_the_table_has_a_row_for_every_line():
    losses = np.array([[1.0, 4.0, 2.0], [10.5, 12.0, 0.125]])
    found = LossBarrier((("a", "b"), ("a", "mean")), np.array([0, 0.5, 1]), losses)
    assert str(found).splitlines() == [
        "line          loss at ends  highest  barrier",
        "a - b      1.0000   2.0000   4.0000   2.5000",
        "a - mean  10.5000   0.1250  12.0000   6.6875",
    ]
