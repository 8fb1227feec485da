"""Files whose names are made for the patterns by which transformers renames tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ..checkpoints.test_hub_matrix import MODELS

transformers = pytest.importorskip("transformers", minversion="5")

OPEN = (
    "import sys; from sksoup import CheckpointCollection\n"
    "from tests.checkpoints.test_hub_matrix import MODELS\n"
    "module = MODELS['Mixtral'][0]()\n"
    "print(len(CheckpointCollection([sys.argv[1]], module=module).layout))"
)


def test_a_long_name_takes_no_longer_than_a_short_one(tmp_path):
    name = "experts.0.w1.weigh" * 60_000
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
