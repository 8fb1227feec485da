"""Soups as plain files of torch.save, with the recipe beside them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from sksoup import CheckpointCollection, Recipe, RecipeError, UniformSoup
from sksoup.mixing import files as mixing_files

from ..zoo import Zoo, same_tensors


@pytest.fixture
def soup(files, zoo: Zoo):
    return UniformSoup().fit(files, zoo.X, zoo.y)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_plain_state_dict_with_its_recipe_beside_it(soup, files, tmp_path, suffix):
    path = tmp_path / f"soup{suffix}"
    soup.save(path, card=True)
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_file())
    assert names == sorted([f"soup{suffix}", "soup.md", "soup.recipe.json"])
    state = torch.load(path, weights_only=True)
    assert type(state) is dict
    assert same_tensors(state, soup.state_dict())
    recipe = Recipe.load(path)
    assert recipe == soup.recipe_
    findings = recipe.verify(path, files)
    assert findings.ok
    assert findings.sha256 == "ok"
    assert same_tensors(CheckpointCollection([path])["soup"], state)


def test_the_recipe_of_another_file_is_not_replaced(soup, tmp_path):
    soup.save(tmp_path / "best.pt")
    soup.save(tmp_path / "best.pt")  # its own
    before = {path.name: path.read_bytes() for path in tmp_path.glob("best*")}
    with pytest.raises(FileExistsError, match=r"would be that of 'best\.pt', too"):
        soup.save(tmp_path / "best.ckpt")
    torch.save({}, tmp_path / "run.ckpt")
    with pytest.raises(FileExistsError, match=r"run\.recipe.* would be that of 'run\.ckpt', too"):
        soup.save(tmp_path / "run.pt")
    assert not (tmp_path / "run.recipe.json").exists()
    (tmp_path / "own.recipe.json").write_text('{"a": "recipe of mine"}')
    with pytest.raises(FileExistsError, match=r"own\.recipe\.json' exists and is no recipe of sks"):
        soup.save(tmp_path / "own.pt")
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("best*")}
    assert not (tmp_path / "own.pt").exists()


def test_what_was_there_stays_if_one_of_the_two_can_not_be_written(soup, tmp_path, monkeypatch):
    path = tmp_path / "soup.pt"
    soup.save(path)
    before = {p: p.read_bytes() for p in (path, tmp_path / "soup.recipe.json")}
    soup.recipe_ = dataclasses.replace(soup.recipe_, method="other")

    def full(tensors, file):
        file.write(b"a part")
        raise RuntimeError("unexpected pos 576 vs 534")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"torch\.save could not write .*soup\.pt") as caught:
            soup.save(path)
    assert any("an existing file is unchanged" in note for note in caught.value.__notes__)
    assert before == {p: p.read_bytes() for p in before}
    (tmp_path / "soup.recipe.json").unlink()
    (tmp_path / "soup.recipe.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"soup\.recipe\.json' can't be written"):
        soup.save(path)
    assert path.read_bytes() == before[path]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["soup.pt", "soup.recipe.json", "zoo"]


def test_a_view_is_written_without_what_it_is_a_part_of(soup, tmp_path):
    large = torch.zeros(100_000)
    mixing_files.write_soup(tmp_path / "a.pt", soup.recipe_, {"w": large[:2], "t": large[:2]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    assert torch.load(tmp_path / "a.pt")["w"].tolist() == [0, 0]


def test_a_recipe_that_is_not_beside_its_file(soup, tmp_path):
    soup.save(tmp_path / "soup.pt")
    (tmp_path / "soup.recipe.json").rename(tmp_path / "moved.json")
    with pytest.raises(RecipeError, match=r"there is no 'soup\.recipe\.json' next to it"):
        Recipe.load(tmp_path / "soup.pt")
    assert Recipe.load(tmp_path / "moved.json") == soup.recipe_
    assert json.loads((tmp_path / "moved.json").read_text())["weights_sha256"]


def test_save_does_not_replace_an_ingredient(soup, files, tmp_path, monkeypatch):
    path = files.path(files.names[3])
    before = path.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    monkeypatch.chdir(path.parent)
    for given in (path, link, path.name):
        with pytest.raises(FileExistsError, match="is one of the checkpoints to be mixed"):
            soup.save(given)
    assert path.read_bytes() == before
    soup.save(tmp_path / "soup.safetensors")
    soup.save(tmp_path / "soup.safetensors")  # a soup may be replaced


@pytest.mark.parametrize(
    "text", [b"MY NOTES", b"", b"\xff", b"---\ntags: [a]\n---\nmodel-soup merge sksoup"]
)
def test_a_card_does_not_replace_another_text(soup, tmp_path, text):
    notes = tmp_path / "soup.md"
    notes.write_bytes(text)
    with pytest.raises(FileExistsError, match=r"soup\.md' exists and is not a model card"):
        soup.save(tmp_path / "soup.safetensors", card=True)
    assert notes.read_bytes() == text
    assert not (tmp_path / "soup.safetensors").exists()
    soup.save(tmp_path / "soup.safetensors")
    notes.unlink()
    for _ in range(2):  # a card of a soup is replaced
        soup.save(tmp_path / "soup.safetensors", card=True)
