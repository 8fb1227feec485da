"""What the README tells people to write runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sksoup import Recipe, __version__

from .pages import run
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


def test_code_of_the_first_page(zoo: Zoo, tmp_path, monkeypatch):
    """The blocks of "Get started", one after the other."""
    pytest.importorskip("matplotlib")
    zoo.checkpoints.save(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    found = run("start", MyNet=Net, X=zoo.X, y=zoo.y)
    assert found["table"].soups["Mine"].score(found["X_test"], found["y_test"]) >= 0
    assert (tmp_path / "soup.html").exists()
    rows = torch.as_tensor(found["X_test"], dtype=torch.float32)
    assert torch.equal(found["net"](rows), found["soup"].module_(rows))


def test_the_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {__version__}\n" in text
