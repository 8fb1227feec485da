from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import (
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    MEHLSoup,
    Recipe,
    RecipeError,
    UniformSoup,
)

from .zoo import Net, Zoo, make_states, same_tensors


@pytest.fixture
def files(tmp_path):
    return CheckpointCollection(make_states(4, seed=0), module=Net).save(tmp_path / "zoo")


def test_records_what_was_mixed(files, zoo: Zoo, tmp_path):
    soup = MEHLSoup(layerwise=True, lr=0.1, random_state=0).fit(files, zoo.X, zoo.y)
    soup.save(tmp_path / "soup.safetensors")
    recipe = Recipe.load(tmp_path / "soup.safetensors")
    assert recipe.method == "MEHLSoup"
    assert np.array_equal(recipe.coef, soup.coef_)
    assert recipe.layers == soup.layers_
    assert recipe.layer_names == soup.layer_names_
    assert recipe.params["lr"] == 0.1
    assert [i.name for i in recipe.ingredients] == list(files.names)
    assert [i.sha256 for i in recipe.ingredients] == [files.sha256(n) for n in files]
    assert recipe.ingredients[0].file == "checkpoint0.safetensors"
    assert {"python", "torch"} <= set(recipe.versions)


def test_json_keeps_every_bit(files, zoo: Zoo, tmp_path):
    soup = MEHLSoup(layerwise=True, random_state=0).fit(files, zoo.X, zoo.y)
    soup.recipe_.save(tmp_path / "recipe.json")
    again = Recipe.load(tmp_path / "recipe.json")
    assert np.array_equal(again.coef, soup.coef_)
    assert again.to_json() == soup.recipe_.to_json()
    assert same_tensors(again.cook(files), soup.state_dict())


def test_ingredients_without_weight_may_be_missing_and_others_may_be_there(
    files, zoo: Zoo, tmp_path
):
    soup = GreedySoup(min_improvement=1.0).fit(files, zoo.X, zoo.y)  # keeps the best one only
    (best,) = soup.ingredients_
    extra = make_states(1, seed=9)[0]
    save_file(extra, tmp_path / "zoo" / "extra.safetensors")
    more = CheckpointCollection.from_path(tmp_path / "zoo")
    assert same_tensors(soup.recipe_.cook(more), soup.state_dict())
    assert same_tensors(soup.recipe_.cook(files.select([best])), soup.state_dict())


def test_renamed_files_are_found_by_their_hash(files, zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    for path in (tmp_path / "zoo").iterdir():
        path.rename(path.with_name(f"renamed-{path.name}"))
    renamed = CheckpointCollection.from_path(tmp_path / "zoo")
    assert same_tensors(soup.recipe_.cook(renamed), soup.state_dict())


def test_a_soup_of_memory_checkpoints_cooks_from_files_of_any_format(zoo: Zoo, tmp_path):
    states = make_states(3, seed=0)
    soup = UniformSoup().fit(CheckpointCollection(states, module=Net), zoo.X, zoo.y)
    paths = [tmp_path / f"checkpoint{k}.pt" for k in range(3)]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    assert same_tensors(soup.recipe_.cook(paths), soup.state_dict())


def test_another_checkpoint_under_the_same_name_is_refused(files, zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    state = files["checkpoint2"]
    state["head.bias"][0] += 1e-3
    (tmp_path / "zoo" / "checkpoint2.safetensors").unlink()
    save_file(state, tmp_path / "zoo" / "checkpoint2.safetensors")
    altered = CheckpointCollection.from_path(tmp_path / "zoo")
    with pytest.raises(RecipeError, match="'checkpoint2' is not the one the recipe was made of"):
        soup.recipe_.cook(altered)
    with pytest.raises(RecipeError, match="needs 'checkpoint2'"):
        soup.recipe_.cook(altered.drop("checkpoint2"))


def test_saving_over_a_soup_is_atomic(files, zoo: Zoo, tmp_path, monkeypatch):
    path = tmp_path / "soup.safetensors"
    UniformSoup().fit(files, zoo.X, zoo.y).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        GreedySoup().fit(files, zoo.X, zoo.y).save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["soup.safetensors", "zoo"]


def test_the_suffix_says_the_format(files, zoo: Zoo, tmp_path):
    with pytest.raises(ValueError, match=r"must end in '\.safetensors', got '\.pt'"):
        UniformSoup().fit(files, zoo.X, zoo.y).save(tmp_path / "soup.pt")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("hello", "is not a sksoup recipe"),
        ("[]", "is not a sksoup recipe"),
        ("{}", "is not a sksoup recipe"),
        ('{"format_version": 99}', "recipe format 99, expected at most 1"),
        ('{"format_version": 1}', "is not a whole sksoup recipe"),
    ],
)
def test_files_that_are_no_recipe(text, match, tmp_path):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=match):
        Recipe.load(tmp_path / "recipe.json")


def test_unknown_fields_of_newer_versions_are_ignored(files, zoo: Zoo):
    recipe = UniformSoup().fit(files, zoo.X, zoo.y).recipe_
    document = {**json.loads(recipe.to_json()), "something_new": [1, 2]}
    assert Recipe.from_json(json.dumps(document)).to_json() == recipe.to_json()


def test_weights_without_a_recipe(files, tmp_path):
    with pytest.raises(RecipeError, match="no sksoup recipe"):
        Recipe.load(tmp_path / "zoo" / "checkpoint0.safetensors")
    with pytest.raises(CheckpointError, match="can't be read"):
        Recipe.load(tmp_path / "missing.json")
    with pytest.raises(CheckpointError, match="can't be opened"):
        Recipe.load(tmp_path / "missing.safetensors")
