"""A module that is being built is counted, and stopped where weights could not fill it."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import nn

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints.growth import bounded_growth
from sksoup.checkpoints.protocol import TensorInfo


def test_only_this_threads_modules_are_counted(tmp_path):
    path = tmp_path / "config.json"
    with bounded_growth({}, path):
        other = Thread(target=lambda: made.append(nn.Sequential(*map(nn.Identity, range(2_001)))))
        made: list[nn.Module] = []
        other.start()
        other.join()
        assert made
        with pytest.raises(CheckpointError, match="more than 2000 modules"):
            nn.Sequential(*map(nn.Identity, range(2_001)))
        with pytest.raises(CheckpointError, match="more than 67108864 elements"):
            nn.Linear(1 << 14, 1 << 13, device="meta")
        torch.ones((1, 1), device="meta").expand(1 << 20, 1 << 20).relu_()  # holds one element
        with pytest.raises(CheckpointError, match="268435456 elements in results on the way"):
            nn.Module().table = torch.zeros(1 << 14, 1 << 14, device="meta") + 1
    nn.Sequential(*map(nn.Identity, range(2_001)))  # nothing is counted any more


def test_the_bound_grows_with_the_weights(tmp_path):
    header = {str(k): TensorInfo((1 << 20,), torch.float32) for k in range(4)}
    with bounded_growth(header, tmp_path / "config.json"), torch.device("meta"):
        nn.Linear(1 << 12, 1 << 13, bias=False)  # 8 * 4 * 2**20 elements
        nn.Sequential(*map(nn.Identity, range(2_080)))
        with pytest.raises(CheckpointError, match="2080 modules, but the weights have 4 tensors"):
            nn.Sequential(nn.Identity())
        nn.BatchNorm1d(1 << 10)  # of its buffers, one is None elsewhere
        with pytest.raises(CheckpointError, match="100663296 elements"):
            nn.Module().register_buffer("mask", torch.ones(1 << 13, 1 << 13))


def test_a_small_network_with_large_masks_is_built(tmp_path):
    """GPT-Neo makes several tables of 2048 x 2048 for each layer, which are no weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoConfig(
        vocab_size=1000, hidden_size=64, num_layers=12, num_heads=4,
        attention_types=[[["global", "local"], 6]], max_position_embeddings=2048,
    )  # fmt: skip
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path / "ft")
    assert len(CheckpointCollection([tmp_path / "ft"]).build_module().transformer.h) == 12
