"""What files can do to the process that opens them: at most, be refused with their name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, mix
from sksoup.checkpoints.prefixes import CHAIN, PREFIXES, _prefixes


@pytest.mark.parametrize(
    "given",
    [[{}, {}], [nn.ReLU(), nn.ReLU()], [{"w": torch.ones(2)}, {}], [{}]],
    ids=["dicts", "modules", "second", "one"],
)
def test_a_checkpoint_without_tensors_is_refused(given):
    """Once, a chain of prefixes was sought in no names at all, without end."""
    with pytest.raises(
        CheckpointError, match=r"checkpoint [01] \(in memory\) holds no tensors, exp"
    ):
        mix(given, [1 / len(given)] * len(given))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_without_tensors_is_refused(tmp_path, suffix):
    path = tmp_path / f"empty.{suffix}"
    torch.save({}, path) if suffix == "pt" else save_file({}, path)
    with pytest.raises(CheckpointError, match=rf"empty\.{suffix}' holds no tensors, expected"):
        CheckpointCollection([path])


def test_no_names_and_long_ones_have_few_prefixes():
    code = "from sksoup.checkpoints.prefixes import _prefixes; print(_prefixes([]))"
    command = ["bash", "-c", f"ulimit -v 8000000; exec {sys.executable} -c '{code}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "['']\n", done.stderr
    assert len(_prefixes([PREFIXES[0] * 100_000])) == CHAIN + 1
