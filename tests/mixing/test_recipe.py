from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import (
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    Recipe,
    RecipeError,
    UniformSoup,
)

from ..zoo import Net, Zoo, make_states, same_tensors


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


# ------------------------------------------------------------------------- verify and card


def test_verify_says_what_differs_and_what_can_not_be_checked(files, zoo: Zoo):
    soup = MEHLSoup(layerwise=True, random_state=0).fit(files, zoo.X, zoo.y)
    recipe, weights = soup.recipe_, soup.state_dict()
    findings = recipe.verify(weights, files)
    assert findings.ok
    assert str(findings).startswith(f"Verified: {len(weights)} of {len(weights)} tensors")
    weights["head.bias"][0] += 1e-3
    weights["hidden.bias"] = weights["hidden.bias"].double()
    del weights["norm.weight"]
    weights["extra"] = torch.ones(1)
    findings = recipe.verify(weights, files)
    assert not findings.ok
    assert findings.differing == {
        "extra": "is not in the recipe",
        "norm.weight": "is missing",
        "head.bias": "has other values",
        "hidden.bias": "is torch.float64 of shape (6,), expected torch.float32 of (6,)",
    }
    assert f"NOT verified: {len(recipe.layers) - 3} of {len(recipe.layers)}" in str(findings)
    assert findings.to_dict()["ok"] is False


def test_what_was_re_estimated_is_not_checked(files, zoo: Zoo):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    recipe = dataclasses.replace(soup.recipe_, recalibrated=("norm.running_mean",))
    weights = soup.state_dict()
    weights["norm.running_mean"] += 1
    findings = recipe.verify(weights, files)
    assert findings.ok
    assert list(findings.unchecked) == ["norm.running_mean"]
    assert "not checked: 'norm.running_mean' was re-estimated from data" in str(findings)


def test_a_missing_ingredient_is_named_unless_it_has_no_part(files, zoo: Zoo):
    soup = GreedySoup().fit(files, zoo.X, zoo.y)
    unused = [name for name in files if name not in soup.ingredients_]
    findings = soup.recipe_.verify(soup.state_dict(), files.select(soup.ingredients_))
    assert findings.ok
    assert [name for name, state in findings.ingredients.items() if state == "unused"] == unused
    lost = soup.ingredients_[0]
    findings = soup.recipe_.verify(soup.state_dict(), files.drop(lost))
    assert not findings.ok
    assert "hold neither that name nor that content" in findings.ingredients[lost]
    assert len(findings.unchecked) == len(soup.recipe_.layers)


def test_cooking_into_a_folder_carries_the_recipe(files, zoo: Zoo, tmp_path):
    soup = MEHLSoup(layerwise=True, random_state=0).fit(files, zoo.X, zoo.y)
    folder = soup.recipe_.cook(files, out=tmp_path / "sharded")
    again = Recipe.load(folder)
    assert again.to_json() == soup.recipe_.to_json()
    assert again.verify(folder, files).ok
    assert Recipe.load(folder / "model.safetensors.index.json").method == "MEHLSoup"


def test_the_card_tells_what_was_mixed(files, zoo: Zoo, tmp_path):
    soup = GreedySoup().fit(files, zoo.X, zoo.y)
    soup.save(tmp_path / "soup.safetensors", card=True)
    card = (tmp_path / "soup.md").read_text()
    assert card.startswith("---\ntags:\n- model-soup\n")
    for name in files:
        assert (f"| {name} |" in card) == (name in soup.ingredients_)
        assert (files.sha256(name) in card) == (name in soup.ingredients_)
    soup.save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.md").exists()


def test_names_can_not_break_out_of_the_card():
    states = make_states(2, seed=0)
    bad = "a|b`<script>alert(1)</script>\n---\n# [x](javascript:y)"
    files = CheckpointCollection(states, names=[bad, "c"])
    recipe = Recipe.record("by hand", files, [0.5, 0.5], layers=dict.fromkeys(states[0], 0))
    card = recipe.to_card()
    assert "<script>" not in card
    assert "\n---\n#" not in card.split("---", 2)[2]
    (row,) = [line for line in card.splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells
    assert re.search(r"(?<!\\)[`\[]", row.split("| `")[0]) is None


def test_the_learned_temperature_is_in_the_card(zoo: Zoo):
    soup = LearnedSoup(random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert f"Multiply the logits by {soup.temperature_:.6g}" in soup.recipe_.to_card()
    recalibrated = dataclasses.replace(soup.recipe_, recalibrated=("a", "b"))
    assert "2 tensors were re-estimated from data" in recalibrated.to_card()


def test_the_recipe_knows_which_state_dict_was_meant(tmp_path):
    paths = []
    for k in range(2):
        paths.append(tmp_path / f"{k}.pt")
        state = {"w": torch.tensor([float(k)])}
        torch.save({"model": state, "ema": {"w": 10 + state["w"]}}, paths[-1])
    ema, model = (CheckpointCollection(paths, key=key) for key in ("ema", "model"))
    recipe = Recipe.from_json(Recipe.record("by hand", ema, [0.5, 0.5], layers={"w": 0}).to_json())
    assert recipe.cook(ema) == {"w": torch.tensor([10.5])}
    with pytest.raises(RecipeError, match=r"was made of key='ema' of '0', and .* key='model'"):
        recipe.cook(model)
    assert "key='ema'" in recipe.verify({"w": torch.tensor([10.5])}, model).ingredients["0"]


def test_ingredients_with_the_same_content(zoo: Zoo):
    a, c = (dict(zoo.checkpoints[name]) for name in ("checkpoint0", "checkpoint1"))
    whole = CheckpointCollection({"a": a, "b": a, "c": c}, module=Net)
    layers = dict.fromkeys(whole.layout, 0)
    recipe = Recipe.record("by hand", whole, [0.2, 0.5, 0.3], layers=layers)
    expected = recipe.cook(whole)
    for held in ({"a": a, "c": c}, {"x": a, "y": a, "b": c}):
        if "b" in held:
            with pytest.raises(RecipeError, match="'b' is not the one"):
                recipe.cook(CheckpointCollection(held))
            held["z"] = held.pop("b")
        assert same_tensors(recipe.cook(CheckpointCollection(held)), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"coef": [0.5, 0.5, 0, 0]}, r"coef has shape \(4,\)"),
        ({"coef": [[0.5, 0.5, 0.0]]}, r"coef has shape \(1, 3\), expected \(4,\)"),
        ({"coef": [[0.5, 0.5, 0.1, 0.0]]}, "must sum to 1"),
        ({"layers": {"head.weight": 5}}, "layers name row 5 of 1"),
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


@pytest.mark.parametrize("soup", [UniformSoup(), LearnedSoup(max_epochs=1), MEHLSoup(max_epochs=1)])
def test_every_soup_names_its_ingredients(files, zoo: Zoo, soup):
    assert soup.fit(files, zoo.X, zoo.y).ingredients_ == files.names
