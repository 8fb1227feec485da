from __future__ import annotations

import torch
from torch import nn

from sksoup.runtime.live_tensors import LiveTensors


def test_counts_what_is_alive_once_per_storage():
    with LiveTensors() as live:
        a = torch.zeros(1000)
        view = a[:10].view(2, 5)
        assert live.now == 4000
        del a
        assert live.now == 4000  # the view keeps it
        del view
        assert live.now == 0
        parts = torch.ones(10).split(5)
        assert live.now == 40
        del parts
    assert live.peak == 4000


def test_leaves_out_activations_and_what_is_ignored():
    known = torch.zeros(100)
    module = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 1))
    with LiveTensors(ignored=[known]) as live:
        x = torch.ones(4, 10)
        module(x).sum().backward()
        known.view(10, 10)
        assert live.peak <= 160 + 4 + 16
    before = live.peak
    torch.zeros(10**4)  # outside: not counted
    assert live.peak == before
