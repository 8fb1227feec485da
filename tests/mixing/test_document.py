"""Recipes as JSON: what is written can be opened, by this version and by those before it."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sksoup import CheckpointCollection, Recipe, RecipeError, UniformSoup
from sksoup.mixing import document
from sksoup.recipe import Ingredient

from ..zoo import Zoo

# as sksoup wrote it before there were digests
VERSION_1 = """{
 "format_version": 1,
 "method": "by hand",
 "ingredients": [
  {
   "name": "a",
   "sha256": "SHA_OF_A",
   "file": null,
   "key": null
  },
  {
   "name": "b",
   "sha256": "SHA_OF_B",
   "file": null,
   "key": null
  }
 ],
 "coef": [
  [
   0.25,
   0.75
  ]
 ],
 "layers": {
  "w": 0
 },
 "layer_names": [
  "0"
 ],
 "params": {
  "lr": 0.1
 },
 "scores": {
  "a": 0.5
 },
 "temperature": 1.0,
 "recalibrated": [],
 "versions": {
  "torch": "2.0"
 },
 "classes": [
  0,
  1
 ]
}"""


def make_recipe(n_layers: int, n_checkpoints: int, seed: int = 0) -> Recipe:
    coef = np.random.default_rng(seed).normal(size=(n_layers, n_checkpoints))
    coef[:, 0] += 1 - coef.sum(axis=1)
    return Recipe(
        "by hand",
        tuple(Ingredient(f"ft{k}", f"{k:064x}", f"ft{k}.pt") for k in range(n_checkpoints)),
        coef,
        {f"layer{row}.weight": row for row in range(n_layers)},
        tuple(f"layer{row}" for row in range(n_layers)),
    )


def test_recipes_of_version_1_are_opened_cooked_and_verified():
    nets = CheckpointCollection({"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([2.0])}})
    text = VERSION_1.replace("SHA_OF_A", nets.sha256("a")).replace("SHA_OF_B", nets.sha256("b"))
    recipe = Recipe.from_json(text)
    assert recipe.coef.tolist() == [[0.25, 0.75]]
    assert recipe.params == {"lr": 0.1}
    assert recipe.weights_sha256 is None
    findings = recipe.verify(recipe.cook(nets), nets)
    assert findings.ok
    assert findings.sha256 == "not recorded"
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(("n_layers", "n_checkpoints"), [(1, 3), (64, 64), (64, 65), (1, 4097)])
def test_many_coefficients_are_written_in_fewer_bytes_and_to_the_last_bit(n_layers, n_checkpoints):
    recipe = make_recipe(n_layers, n_checkpoints)
    text = recipe.to_json()
    assert isinstance(json.loads(text)["coef"], dict) == (recipe.coef.size > 4096)
    again = Recipe.from_json(text)
    assert again.coef.tobytes() == recipe.coef.tobytes()
    assert again.coef.flags.writeable
    assert again == recipe


def test_a_large_recipe_is_small():
    assert len(make_recipe(500, 200).to_json()) < 1_200_000  # 2.6 MB as numbers


def test_the_digest_is_of_the_document_and_not_of_its_layout():
    text = make_recipe(2, 3).to_json()
    found = json.loads(text)
    assert Recipe.from_json(json.dumps(dict(reversed(found.items())))).to_json() == text
    recorded = found.pop("sha256")
    plain = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(plain.encode()).hexdigest() == recorded


def test_a_change_on_purpose_has_a_way():
    found = json.loads(make_recipe(2, 3).to_json()) | {"method": "mine"}
    with pytest.raises(RecipeError, match=r"was changed after it was written.*'format_version' to"):
        Recipe.from_json(json.dumps(found))
    del found["sha256"]
    with pytest.raises(RecipeError, match="it has no 'sha256'"):
        Recipe.from_json(json.dumps(found))
    assert Recipe.from_json(json.dumps(found | {"format_version": 1})).method == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": np.nan},
        {"scores": {"ft0": np.inf}},
        {"method": "half a surrogate \udcff"},
        {"recalibrated": ("layer0.weight",)},
        {"layers": {"layer0.weight": 9}},
    ],
)
def test_what_could_not_be_opened_is_not_written(change, tmp_path):
    recipe = dataclasses.replace(make_recipe(2, 3), **change)
    with pytest.raises(RecipeError, match="The recipe can't be written"):
        recipe.save(tmp_path / "recipe.json")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_no_header_has_room_for(files, zoo: Zoo, tmp_path, monkeypatch):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    path = tmp_path / "soup.safetensors"
    soup.save(path)
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
    path.unlink()
    monkeypatch.setattr(document, "MOST_BYTES", n_bytes - 1)
    for write in (
        lambda: soup.save(path),
        lambda: soup.recipe_.cook(files, out=tmp_path / "shards"),
    ):
        with pytest.raises(RecipeError, match=r"with the names of the tensors.*layerwise="):
            write()
    monkeypatch.setattr(document, "MOST_BYTES", 100)
    with pytest.raises(RecipeError, match=r"MB as text, but the header.*layerwise="):
        soup.recipe_.save(tmp_path / "recipe.json")
    assert [p.name for p in tmp_path.iterdir()] == ["zoo"]


def test_the_digest_in_a_file_is_of_its_tensors(files, zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    soup.save(tmp_path / "soup.safetensors")
    digest = hashlib.sha256()
    with safe_open(tmp_path / "soup.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            value = file.get_tensor(name)
            entry = json.dumps([name, str(value.dtype), list(value.shape)])
            digest.update(entry.encode() + value.numpy().tobytes())
    recipe = Recipe.load(tmp_path / "soup.safetensors")
    assert recipe.weights_sha256 == digest.hexdigest()
    assert recipe == soup.recipe_


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(
    LEAVES, lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=8
)


@given(st.sampled_from(sorted(json.loads(make_recipe(2, 3).to_json()))), JSON)
def test_any_json_is_a_recipe_or_a_recipe_error(field, value):
    found = json.loads(make_recipe(2, 3).to_json()) | {"format_version": 1}
    del found["sha256"]
    found[field] = value
    try:
        recipe = Recipe.from_json(json.dumps(found))
    except RecipeError:
        return
    assert Recipe.from_json(recipe.to_json()) == recipe
    recipe.to_card()
