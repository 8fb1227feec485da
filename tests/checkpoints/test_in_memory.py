"""State dicts in memory are copies."""

from __future__ import annotations

import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError

from ..zoo import Net


def test_memory_checkpoints_are_copies():
    net = Net()
    collection = CheckpointCollection([net])
    with torch.no_grad():
        net.head.weight.zero_()
    assert collection["checkpoint0"]["head.weight"].any()
    collection["checkpoint0"]["head.weight"].zero_()
    assert collection["checkpoint0"]["head.weight"].any()


def test_sparse_tensors_are_refused():
    with pytest.raises(CheckpointError, match="sparse"):
        CheckpointCollection([{"w": torch.eye(2).to_sparse()}])
