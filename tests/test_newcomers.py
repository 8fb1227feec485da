"""What stopped people on their first day does so no more."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    Recipe,
    RecipeError,
    SoupWarning,
    UniformSoup,
)
from sksoup.inspection import compare_soups

from .zoo import Net, Zoo, make_states


@pytest.fixture
def ddp(tmp_path):
    """Training containers of a module that ran under DDP."""
    for k, state in enumerate(make_states(3, 0)):
        names = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "state_dict": names}, tmp_path / f"run{k}.pt")
    return tmp_path


def test_a_soup_of_ddp_files_is_verified_without_their_module(ddp, zoo: Zoo):
    nets = CheckpointCollection.from_path(ddp, module=Net)
    soup = UniformSoup().fit(nets, zoo.X, zoo.y)
    (ddp / "out").mkdir()
    soup.save(ddp / "out" / "soup.safetensors")
    bare = CheckpointCollection.from_path(ddp / "run*.pt")
    recipe = Recipe.load(ddp / "out" / "soup.safetensors")
    assert recipe.verify(ddp / "out" / "soup.safetensors", bare).ok
    for name, value in recipe.cook(bare).items():
        assert torch.equal(value, soup.state_dict()[name])
    command = [sys.executable, "-m", "sksoup", "verify", "out/soup.safetensors", "run*.pt"]
    done = subprocess.run(command, cwd=ddp, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # and the other way: recorded with the prefix, opened without
    assert "module.head.bias" in bare.layout
    recorded = Recipe.record("by hand", bare, [1 / 3] * 3, layers=dict.fromkeys(bare.layout, 0))
    assert recorded.cook(nets).keys() == bare.layout.keys()


def test_tensors_that_are_not_the_recipes_are_named(tmp_path):
    nets = CheckpointCollection([{"a": torch.ones(2)}, {"a": torch.zeros(2)}])
    recipe = Recipe.record("by hand", nets, [0.5, 0.5], layers={"b": 0})
    with pytest.raises(RecipeError, match=r"differ from those of the recipe: 'a' is in only one"):
        recipe.cook(nets)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, list])
@pytest.mark.parametrize("key", ["labels", "wanted"])
def test_a_dict_may_hold_its_labels(kind, key):
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.table(tokens).mean(dim=1)

    torch.manual_seed(0)
    nets = CheckpointCollection([Embed() for _ in range(3)])
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 10, (12, 4)).tolist(), [0, 1, 2] * 4
    apart = UniformSoup().fit(nets, {"tokens": kind(tokens)}, labels)
    rows = {"tokens": kind(tokens), key: kind(labels)}
    y = None if key == "labels" else key
    together = UniformSoup().fit(nets, rows, y)
    assert together.score(rows, y) == apart.score({"tokens": kind(tokens)}, labels)
    if key == "labels":
        assert np.array_equal(together.predict(rows), apart.predict({"tokens": kind(tokens)}))


def test_lists_that_were_not_padded_and_texts_that_were_not_tokenized(zoo: Zoo):
    with pytest.raises(ValueError, match=r"lists of different lengths.*padding=True"):
        UniformSoup().fit(zoo.checkpoints, {"X": [[1, 2], [1]]}, [0, 1])
    with pytest.raises(TypeError, match="or strings, which must be tokenized first"):
        UniformSoup().fit(zoo.checkpoints, ["good soup", "bad soup"], [0, 1])


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has a umask")
def test_a_soup_may_be_read_by_whom_other_files_may(zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    soup.save(tmp_path / "soup.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "soup.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_comparison_warns_once():
    torch.manual_seed(0)
    strangers = CheckpointCollection([nn.Linear(40, 3) for _ in range(4)])
    X, y = torch.randn(30, 40), torch.arange(30) % 3
    with pytest.warns(SoupWarning) as caught:
        compare_soups(strangers, X, y, recipes={"mean": UniformSoup()})
    assert len(caught) == 1


def test_a_report_says_which_row_is_the_soup(zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    found = compare_soups(zoo.checkpoints, zoo.X, zoo.y, recipes={"Mine": soup})
    soup.report(tmp_path / "a.html", found)
    assert "This soup is not in the table" in (tmp_path / "a.html").read_text()
    found.soups["Mine"].report(tmp_path / "b.html", found)
    assert "This soup is the row &#x27;Mine&#x27;." in (tmp_path / "b.html").read_text()


def test_texts_as_targets_in_the_rows_are_explained(zoo: Zoo):
    names = np.array(["ham", "spam", "ad"])[zoo.y]
    with pytest.raises(TypeError, match=r"first is .*'(ham|spam|ad)'.*Pass strings separately"):
        BestCheckpoint().fit(zoo.checkpoints, {"x": zoo.X, "labels": names})


def test_a_dict_of_more_rows_than_targets_is_explained(zoo: Zoo):
    with pytest.raises(ValueError, match=r"'x' with 60 rows, and y has 10 targets"):
        BestCheckpoint().fit(zoo.checkpoints, {"x": torch.as_tensor(zoo.X)}, zoo.y[:10])


def test_a_folder_of_checkpoints_may_hold_the_memory(tmp_path, zoo: Zoo):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    BestCheckpoint(memory=tmp_path / "zoo" / "memory").fit(files, zoo.X, zoo.y)
    assert CheckpointCollection.from_path(tmp_path / "zoo").names == files.names
    assert CheckpointCollection.from_path(tmp_path).names == files.names
