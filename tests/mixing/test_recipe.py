from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from sksoup import (
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    MEHLSoup,
    Recipe,
    RecipeError,
    UniformSoup,
)

from ..zoo import PaperLearned, PaperMEHL, Zoo, same_tensors


@pytest.mark.parametrize("coef", [[1.0], [0.5, 0.25, 0.25], [[[0.5, 0.5]]]])
def test_coefficients_of_other_checkpoints_are_refused(coef):
    checkpoints = CheckpointCollection([{"w": torch.ones(2)}, {"w": torch.zeros(2)}])
    with pytest.raises(ValueError, match="expected one coefficient for each of the 2 checkpoints"):
        Recipe.record("mine", checkpoints, coef, layers={"w": 0})


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


def test_saving_over_a_soup_is_atomic(files, zoo: Zoo, tmp_path, monkeypatch):
    path = tmp_path / "soup.safetensors"
    UniformSoup().fit(files, zoo.X, zoo.y).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        GreedySoup().fit(files, zoo.X, zoo.y).save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["soup.safetensors", "zoo"]


def test_the_suffix_says_the_format(files, zoo: Zoo, tmp_path, monkeypatch):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    monkeypatch.setattr(UniformSoup, "state_dict", None)  # before any work
    with pytest.raises(
        ValueError, match=r"end in \.safetensors, \.pt, \.pth, \.bin or \.ckpt, got '\.h5'"
    ):
        soup.save(tmp_path / "soup.h5")
    with pytest.raises(ValueError, match=r"got ''"):
        soup.save(tmp_path / "soup")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("hello", "is not a sksoup recipe"),
        ("[]", "is not a sksoup recipe"),
        ("{}", "is not a sksoup recipe"),
        ('{"format_version": 99}', "recipe format 99, expected 1 to 2"),
        ('{"format_version": 1}', "is not a complete sksoup recipe"),
    ],
)
def test_files_that_are_no_recipe(text, match, tmp_path):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=match):
        Recipe.load(tmp_path / "recipe.json")


def test_unknown_fields_of_newer_versions_are_ignored(files, zoo: Zoo):
    recipe = UniformSoup().fit(files, zoo.X, zoo.y).recipe_
    document = {**json.loads(recipe.to_json()), "something_new": [1, 2], "format_version": 1}
    del document["sha256"]
    assert Recipe.from_json(json.dumps(document)).to_json() == recipe.to_json()


def test_weights_without_a_recipe(files, tmp_path):
    with pytest.raises(RecipeError, match="no sksoup recipe"):
        Recipe.load(tmp_path / "zoo" / "checkpoint0.safetensors")
    with pytest.raises(CheckpointError, match="can't be read"):
        Recipe.load(tmp_path / "missing.json")
    with pytest.raises(CheckpointError, match="can't be opened"):
        Recipe.load(tmp_path / "missing.safetensors")


def test_cooking_into_a_folder_carries_the_recipe(files, zoo: Zoo, tmp_path):
    soup = MEHLSoup(layerwise=True, random_state=0).fit(files, zoo.X, zoo.y)
    folder = soup.recipe_.cook(files, out=tmp_path / "sharded")
    again = Recipe.load(folder)
    assert again.to_json() == soup.recipe_.to_json()
    assert again.verify(folder, files).ok
    assert Recipe.load(folder / "model.safetensors.index.json").method == "MEHLSoup"


def test_what_is_cooked_into_a_folder_is_all_mixed(files, zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    recipe = dataclasses.replace(soup.recipe_, recalibrated=("norm.running_mean",))
    folder = recipe.cook(files, out=tmp_path / "sharded")
    findings = Recipe.load(folder).verify(folder, files)
    assert findings.ok
    assert findings.unchecked == {}
    assert findings.sha256 == "not recorded"
    assert "SHA-256 of the tensors: not recorded, so it was not checked." in str(findings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"coef": [0.5, 0.5, 0, 0]}, "a row of coef is 0.5, expected a list"),
        ({"coef": [[0.5, 0.5, 0.0]]}, r"coef has shape \(1, 3\), expected \(4,\)"),
        ({"coef": [[0.5, 0.5, 0.1, 0.0]]}, "must sum to 1"),
        ({"layers": {"head.weight": 5}}, r"'\] is 5, expected a row of coef in \[0, 1\)"),
        ({"layer_names": ["all", "more"]}, "for 2 layers"),
    ],
)
def test_a_recipe_that_was_edited(files, change, match):
    recipe = Recipe.record(
        "by hand", files, [[0.25] * 4], layers=dict.fromkeys(files.layout, 0), layer_names=("all",)
    )
    document = json.loads(recipe.to_json()) | change
    with pytest.raises(RecipeError, match=match):
        Recipe.from_json(json.dumps(document))


def test_recipes_are_compared_by_what_they_say(files):
    layers = dict.fromkeys(files.layout, 0)
    one, same, other = (
        Recipe.record("by hand", files, coef, layers=layers)
        for coef in ([0.25] * 4, [0.25] * 4, [0.4, 0.2, 0.2, 0.2])
    )
    assert one == same != other
    assert len({one, same, other}) == 2
    assert dataclasses.replace(one, weights_sha256="0" * 64) == one
    assert one != "a recipe"


def test_the_recipe_and_the_card_have_the_labels(files, zoo: Zoo, tmp_path):
    labels = np.array(["cat", "dog", "owl"])
    soup = UniformSoup().fit(files, zoo.X, labels[zoo.y])
    soup.save(tmp_path / "soup.safetensors")
    recipe = Recipe.load(tmp_path / "soup.safetensors")
    assert recipe.classes == ("cat", "dog", "owl")
    assert "Outputs, in order: `cat`, `dog`, `owl`." in recipe.to_card()
    numbers = UniformSoup().fit(files, zoo.X, zoo.y).recipe_
    assert numbers.classes == (0, 1, 2)
    assert json.loads(numbers.to_json())["classes"] == [0, 1, 2]


@pytest.mark.parametrize(
    "soup",
    [
        UniformSoup(),
        PaperLearned(max_epochs=1),
        PaperMEHL(max_epochs=1),
    ],
)
def test_every_soup_names_its_ingredients(files, zoo: Zoo, soup):
    assert soup.fit(files, zoo.X, zoo.y).ingredients_ == files.names
