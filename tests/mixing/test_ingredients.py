"""Ingredients are found by name or by content, and others are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, GreedySoup, Recipe, RecipeError, UniformSoup
from sksoup.checkpoints import collection

from ..zoo import Net, Zoo, make_states, same_tensors


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


def test_the_content_of_a_checkpoint_is_hashed_once(zoo: Zoo, tmp_path, monkeypatch):
    """Each ingredient is compared with each checkpoint."""
    states = make_states(3, seed=0)
    soup = UniformSoup().fit(CheckpointCollection(states, module=Net), zoo.X, zoo.y)
    for k, state in enumerate(reversed(states)):
        save_file(state, tmp_path / f"renamed{k}.safetensors")
    hashed, original = [], collection.content_sha256
    monkeypatch.setattr(
        collection, "content_sha256", lambda one: hashed.append(one) or original(one)
    )
    files = CheckpointCollection.from_path(tmp_path)
    for _ in range(2):
        assert soup.recipe_.verify(soup.state_dict(), files).ok
    assert len(hashed) == 3


def test_another_checkpoint_under_the_same_name_is_refused(files, zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    state = files["checkpoint2"]
    state["head.bias"][0] += 1e-3
    (tmp_path / "zoo" / "checkpoint2.safetensors").unlink()
    save_file(state, tmp_path / "zoo" / "checkpoint2.safetensors")
    altered = CheckpointCollection.from_path(tmp_path / "zoo")
    with pytest.raises(
        RecipeError, match="'checkpoint2' is not the one that the recipe was made of"
    ):
        soup.recipe_.cook(altered)
    with pytest.raises(RecipeError, match="needs 'checkpoint2'"):
        soup.recipe_.cook(altered.drop("checkpoint2"))


def test_the_recipe_knows_which_state_dict_was_meant(tmp_path):
    paths = []
    for k in range(2):
        paths.append(tmp_path / f"{k}.pt")
        state = {"w": torch.tensor([float(k)])}
        torch.save({"model": state, "ema": {"w": 10 + state["w"]}}, paths[-1])
    ema, model = (CheckpointCollection(paths, key=key) for key in ("ema", "model"))
    recipe = Recipe.from_json(Recipe.record("by hand", ema, [0.5, 0.5], layers={"w": 0}).to_json())
    assert recipe.cook(ema) == {"w": torch.tensor([10.5])}
    with pytest.raises(RecipeError, match=r"was made with key='ema' of '0', but .* key='model'"):
        recipe.cook(model)
    assert "key='ema'" in recipe.verify({"w": torch.tensor([10.5])}, model).ingredients["0"]


def test_the_recipe_knows_which_prefix_was_meant(tmp_path):
    paths = []
    for k in range(2):
        paths.append(tmp_path / f"{k}.safetensors")
        w = torch.tensor([float(k)])
        save_file({"student.w": w, "teacher.w": 10 + w}, paths[-1])
    student, teacher = (CheckpointCollection(paths, prefix=p) for p in ("student.", "teacher."))
    recipe = Recipe.record("by hand", teacher, [0.5, 0.5], layers={"w": 0})
    recipe = Recipe.from_json(recipe.to_json())
    assert recipe.cook(teacher) == {"w": torch.tensor([10.5])}
    with pytest.raises(RecipeError, match=r"made with prefix='teacher\.' of '0', .*'student\.'"):
        recipe.cook(student)
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    bert = transformers.BertModel(config)
    old = {n.replace("Norm.weight", "Norm.gamma"): w for n, w in bert.state_dict().items()}
    both = {f"{part}.{name}": w.clone() for part in "ab" for name, w in old.items()}
    save_file(both, tmp_path / "old.safetensors")
    converted = CheckpointCollection([tmp_path / "old.safetensors"], prefix="a.", module=bert)
    layers = dict.fromkeys(converted.layout, 0)
    assert Recipe.record("by hand", converted, [1.0], layers=layers).ingredients[0].prefix == "a."
    save_file({"w": torch.tensor([2.0])}, tmp_path / "alone.safetensors")
    alone = CheckpointCollection([tmp_path / "alone.safetensors"])
    assert Recipe.record("by hand", alone, [1.0], layers={"w": 0}).ingredients[0].prefix is None


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
