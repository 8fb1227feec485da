"""Files whose names are made for the patterns by which transformers renames tensors."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from sksoup import CheckpointCollection, CheckpointError, mix

from ..checkpoints.test_hub_matrix import MODELS

transformers = pytest.importorskip("transformers", minversion="5")

OPEN = (
    "import sys; from sksoup import CheckpointCollection\n"
    "from tests.checkpoints.test_hub_matrix import MODELS\n"
    "module = MODELS['Mixtral'][0]()\n"
    "print(len(CheckpointCollection([sys.argv[1]], module=module).layout))"
)


def test_a_long_name_takes_no_longer_than_a_short_one(tmp_path):
    name = "experts.0.w1.weigh" * 55  # the longest ones that are opened
    model = MODELS["Mixtral"][0]()
    model.save_pretrained(tmp_path)
    save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    out = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert out.stdout == "1\n", out.stderr


def test_experts_that_are_there_twice_are_refused(tmp_path):
    """Once one by one, as transformers stores them, and once merged, as the module has them."""
    model = MODELS["Mixtral"][0]()
    model.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.down_proj" in model.state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    CheckpointCollection([tmp_path]).build_module()
    merged = {n: torch.ones_like(w) for n, w in model.state_dict().items() if "experts" in n}
    assert not merged.keys() & stored.keys()
    save_file({**stored, **merged}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds 'model.*experts.*' twice, as one tensor and"):
        CheckpointCollection([tmp_path])


def test_masks_that_old_versions_stored_are_ignored(tmp_path):
    """As in the files of gpt2 on the hub; modules have no buffer of these names any more."""
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for name in ("gpt2", "ft0"):
        model.save_pretrained(tmp_path / name)
    state = {
        name.removeprefix("transformer."): value.clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    masks = {f"h.{k}.attn.bias": torch.ones(8, 8).tril()[None, None] for k in range(2)}
    save_file(state | masks, tmp_path / "gpt2" / "model.safetensors", {"format": "pt"})
    collection = CheckpointCollection([tmp_path / "gpt2", tmp_path / "ft0"])
    expected = model.state_dict()
    mixed = mix(collection, [0.5, 0.5])
    assert not any(name.endswith(".attn.bias") for name in mixed)
    assert all(torch.equal(value, expected[name]) for name, value in mixed.items())


def test_the_names_of_a_model_are_listed_once_for_all_files(tmp_path):
    """Once, each file with another name cost as much as a file with all of them."""
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    calls = []
    for n in (2, 20):
        for k in range(n):
            save_file({f"t{k}": torch.ones(1)}, tmp_path / f"ft{k}.safetensors")
        state_dict = transformers.PreTrainedModel.state_dict
        with (
            patch.object(
                transformers.PreTrainedModel, "state_dict", autospec=True, side_effect=state_dict
            ) as listed,
            pytest.raises(CheckpointError, match=r"cannot join this collection: .*it adds 't0'"),
        ):
            CheckpointCollection.from_path(tmp_path, module=tmp_path / "base")
        calls.append(listed.call_count)
    assert calls[0] == calls[1] > 0
