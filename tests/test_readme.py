"""What the README tells people to write runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sksoup import Recipe, __version__

from .zoo import Net, Zoo

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_there_is_code():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_code_of_the_readme(code, zoo: Zoo, tmp_path, monkeypatch):
    zoo.checkpoints.save(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    rows = {"X_val": zoo.X, "y_val": zoo.y, "X_test": zoo.X[:20], "y_test": zoo.y[:20]}
    found = {"build_model": Net, **rows}
    exec(compile(code, "README.md", "exec"), found)
    assert isinstance(found["soup"].module_, torch.nn.Module)
    weights = Recipe.load("soup.safetensors").cook(found["ckpts"])
    assert np.array_equal(weights["head.bias"], found["soup"].state_dict()["head.bias"])


def test_the_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {__version__}\n" in text
