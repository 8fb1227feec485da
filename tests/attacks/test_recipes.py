"""Recipes that someone else wrote: in soups that are not what they say, in cards and terminals."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sksoup import CheckpointCollection, CheckpointError, Recipe, RecipeError, UniformSoup, mix
from sksoup.__main__ import main
from sksoup.mixing.mix import check_coef
from sksoup.mixing.verification import digest_of_tensors
from sksoup.recipe import Ingredient

from ..zoo import Zoo, make_states

STATES = dict(zip("abc", make_states(3, seed=0), strict=True))
NETS = CheckpointCollection(STATES)
RECIPE = Recipe.record(
    "UniformSoup", NETS, [0.5, 0.5, 0.0],
    layers=dict.fromkeys(NETS.layout, 0), layer_names=("all",),
    params={"lr": 0.1, "none": None}, scores={"a": 0.75, "b": 0.5}, temperature=1.5,
    recalibrated=("norm.running_mean",), versions={"torch": "2.0"}, classes=("cat", 1),
    weights_sha256="0" * 64,
)  # fmt: skip


# ------------------------------------------------------------------ verify


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all that is in a JSON document and holds nothing else."""
    if not isinstance(value, (dict, list)) or not value:
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, part in items for leaf in leaves(part, (*path, key))]


def soup_and_document() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights = RECIPE.cook(NETS)
    weights["norm.running_mean"] += 1
    recipe = dataclasses.replace(RECIPE, weights_sha256=digest_of_tensors(weights))
    assert recipe.verify(weights, NETS).ok
    return weights, json.loads(recipe.to_json())


WEIGHTS, DOCUMENT = soup_and_document()
OTHER = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.sampled_from(leaves(DOCUMENT)), OTHER)
def test_any_change_of_a_recipe_is_seen(path, value):
    document = copy.deepcopy(DOCUMENT)
    place = document
    for key in path[:-1]:
        place = place[key]
    if type(place[path[-1]]) is type(value) and place[path[-1]] == value:
        return
    place[path[-1]] = value
    with pytest.raises(RecipeError):
        Recipe.from_json(json.dumps(document))


@given(st.sampled_from(sorted(DOCUMENT)))
def test_any_field_that_is_lost_is_seen(name):
    document = {key: value for key, value in DOCUMENT.items() if key != name}
    with pytest.raises(RecipeError):
        Recipe.from_json(json.dumps(document))


def test_an_added_ingredient_of_coefficient_0_is_seen():
    document = copy.deepcopy(DOCUMENT)
    document["ingredients"].append(dict(DOCUMENT["ingredients"][0], name="famous"))
    document["coef"][0].append(0.0)
    with pytest.raises(RecipeError, match="was changed after it was written"):
        Recipe.from_json(json.dumps(document))


@pytest.mark.parametrize("name", ["head.weight", "head.running_mean", "norm.weight", ""])
def test_only_statistics_are_excused(name):
    document = dict(DOCUMENT, format_version=1, recalibrated=[name])
    del document["sha256"]
    with pytest.raises(RecipeError, match="expected BatchNorm statistics"):
        Recipe.from_json(json.dumps(document))
    weights = dict(WEIGHTS, **{"head.weight": torch.zeros(3, 6)})
    findings = dataclasses.replace(RECIPE, recalibrated=("head.weight",)).verify(weights, NETS)
    assert findings.differing["head.weight"] == "has other values"


@pytest.mark.parametrize(
    ("name", "value", "how"),
    [
        ("head.weight", torch.zeros(3, 6), "has other values"),
        ("norm.running_mean", torch.zeros(6).double(), "is torch.float64 of shape"),
        ("norm.running_mean", torch.zeros(7), "expected torch.float32 of"),
        ("norm.running_mean", torch.zeros(6), None),
    ],
)
@pytest.mark.parametrize("with_digest", [True, False])
def test_replaced_tensors_are_seen(name, value, how, with_digest):
    recipe = Recipe.from_json(json.dumps(DOCUMENT))
    if not with_digest:
        recipe = dataclasses.replace(recipe, weights_sha256=None)
    findings = recipe.verify(dict(WEIGHTS, **{name: value}), NETS)
    assert findings.ok == (how is None and not with_digest)
    assert findings.sha256 == ("differs" if with_digest else "not recorded")
    if how is not None:
        assert how in findings.differing[name]
    if with_digest:
        assert str(findings).startswith("NOT verified")
        assert "SHA-256 of the tensors: NOT as recorded." in str(findings)


def test_verify_says_what_it_does_not_prove():
    said = str(Recipe.from_json(json.dumps(DOCUMENT)).verify(WEIGHTS, NETS))
    assert "SHA-256 of the tensors: as recorded." in said
    assert said.endswith("A SHA-256 shows accidental changes; it is not a signature.")


def test_replaced_statistics_in_a_file(zoo: Zoo, tmp_path, capsys):
    nets = CheckpointCollection(make_states(3, seed=0), module=zoo.checkpoints.module)
    nets = nets.save(tmp_path / "runs")
    path = tmp_path / "soup.safetensors"
    UniformSoup(batch_norm="recalibrate").fit(nets, zoo.X, zoo.y).save(path)
    assert main(["verify", str(path), str(tmp_path / "runs")]) == 0
    assert "SHA-256 of the tensors: as recorded." in capsys.readouterr().out
    weights = load_file(path)
    weights["norm.running_mean"] += 1
    text = Recipe.load(path).to_json()
    save_file(weights, path, {"sksoup": text})
    assert main(["verify", str(path), str(tmp_path / "runs")]) == 1
    assert "NOT as recorded" in capsys.readouterr().out


# ------------------------------------------------------------------ reading


def edited(**fields: Any) -> str:
    """A recipe with other fields, by someone who also writes the digest that fits."""
    document = {k: v for k, v in DOCUMENT.items() if k != "sha256"} | {"format_version": 1}
    return json.dumps(document | fields)


INGREDIENT = DOCUMENT["ingredients"][0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (edited(coef=[[10**400, 0, 0]]), "not a complete sksoup recipe: int too large"),
        (edited(temperature=10**400), "too large"),
        (edited(scores={"a": 10**400}), "too large"),
        (edited(coef="X").replace('"X"', "[[1e400, 0, 0]]"), "not a sksoup recipe"),
        (edited(temperature="X").replace('"X"', "1e400"), "not a sksoup recipe"),
        (edited(params="X").replace('"X"', '{"a": -1e400}'), "not a sksoup recipe"),
        (edited(params="X").replace('"X"', "1" * 5000), "not a sksoup recipe"),
        (edited(coef=[[float("nan"), 0, 0]]), "holds NaN, expected finite"),
        (edited(scores={"a": float("nan")}), "holds NaN, expected finite"),
        (edited(params={"a": float("inf")}), "holds Infinity, expected finite"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format_version": 1, "params": ' + '{"a":' * 100_000, "nested too deeply"),
        (edited(params="X").replace('"X"', '{"a":' * 50 + "1" + "}" * 50), "deeper than 20"),
        (edited(method="X").replace("X", "\\ud800"), "has an unpaired surrogate"),
        (edited(classes=["X"]).replace("X", "\\udcff"), "has an unpaired surrogate"),
        (edited(layers="X").replace('"X"', '{"w": 0, "w": 0}'), "it has 'w' twice"),
        ('{"format_version": 1, "format_version": 2}', "it has 'format_version' twice"),
        (edited(format_version=-5), "recipe format -5, expected 1 to 2"),
        (edited(format_version=0), "recipe format 0"),
        (edited(format_version=True), "recipe format True"),
        (edited(format_version=1.5), "recipe format 1.5"),
        (edited(format_version="1"), "recipe format '1'"),
        (edited(ingredients=None), "ingredients is None, expected a list"),
        (edited(ingredients=[None, None, None]), "an ingredient is None, expected a mapping"),
        (edited(ingredients=[dict(INGREDIENT, sha256=None)] * 3), "sha256 of 'a' is None"),
        (edited(ingredients=[dict(INGREDIENT, sha256="<b>")] * 3), "64 hexadecimal digits"),
        (edited(ingredients=[dict(INGREDIENT, sha256="٠" * 64)] * 3), "64 hexadecimal digits"),
        (edited(ingredients=[dict(INGREDIENT, sha256="0" * 64 + "\n")] * 3), "64 hexadecimal"),
        (edited(ingredients=[dict(INGREDIENT, name=["a"])] * 3), "name of an ingredient is"),
        (edited(ingredients=[dict(INGREDIENT, file=3)] * 3), "the file of 'a' is 3"),
        (edited(ingredients=[dict(INGREDIENT, key={})] * 3), "the key of 'a' is {}"),
        (edited(ingredients=[dict(INGREDIENT, prefix=0)] * 3), "the prefix of 'a' is 0"),
        (edited(ingredients=[INGREDIENT] * 3), "two ingredients have the same name"),
        (edited(coef=[["0.5", "0.5", "0"]]), "coef holds '0.5', expected numbers"),
        (edited(coef=[[True, False, False]]), "coef holds True"),
        (edited(coef=[[None, 1, 0]]), "coef holds None"),
        (edited(coef=[[1, 0, 0], [1, 0]]), "not a complete sksoup recipe"),
        (edited(coef=[]), "not a complete sksoup recipe"),
        (edited(coef=[[]]), "not a complete sksoup recipe"),
        (edited(coef={"shape": [1, 3], "float64": "AAAA"}), "3 bytes for 1 layers and 3 ingr"),
        (edited(coef={"shape": [3, 1], "float64": "A" * 32}), "coef has shape"),
        (edited(coef={"shape": [1, 3], "float64": "!" * 32}), "not a complete sksoup recipe"),
        (edited(coef={"shape": [1, 3], "float64": "/" * 32}), "NaN or infinite"),
        (edited(coef={"shape": [1, 3]}), "it has no 'float64'"),
        (edited(layers={"w": 0.0}), "is 0.0, expected a row"),
        (edited(layers={"w": False}), "is False, expected a row"),
        (edited(layers={"w": -1}), "is -1, expected a row"),
        (edited(layers={"w": 10**100}), "expected a row of coef"),
        (edited(layers=["w"]), "layers is"),
        (edited(layer_names=[1]), "an entry of layer_names is 1"),
        (edited(layer_names="a"), "layer_names is 'a', expected a list"),
        (edited(params=[["a", 1]]), "params is"),
        (edited(scores={"a": "0.5"}), "expected a finite number"),
        (edited(scores={"a": True}), "expected a finite number"),
        (edited(temperature=0), "expected a number above 0"),
        (edited(temperature=-1.5), "expected a number above 0"),
        (edited(temperature="2"), "temperature is '2'"),
        (edited(temperature=None), "temperature is None"),
        (edited(versions={"torch": 2}), "expected a string"),
        (edited(classes=[["a"]]), "classes holds"),
        (edited(classes="ab"), "classes is 'ab', expected a list"),
        (edited(recalibrated="norm.running_mean"), "expected a list"),
        (edited(weights_sha256="0"), "weights_sha256 is '0'"),
        (edited(sha256=[]), "was changed after it was written"),
        (edited(method=3), "method is 3, expected a string"),
    ],
)
def test_strange_recipes_are_refused_before_anything_is_used(text, match):
    with pytest.raises(RecipeError, match=match):
        Recipe.from_json(text)


def test_errors_are_short_whatever_they_are_about():
    long = "w" * 1_000_000
    for text in (edited(method=[long]), edited(layers={long: 9}), edited(recalibrated=[long])):
        with pytest.raises(RecipeError) as raised:
            Recipe.from_json(text)
        assert len(str(raised.value)) < 1000


def test_a_pipe_or_an_endless_file_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.json")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        Recipe.load(tmp_path / "recipe.json")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        Recipe.load("/dev/zero")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**12)  # a file with a hole
    with pytest.raises(CheckpointError, match="is larger than 100,000,000 bytes"):
        Recipe.load(tmp_path / "large.json")


# ------------------------------------------------------------------ cards and terminals


def test_no_field_of_a_recipe_breaks_out_of_the_card():
    bad = "x`</code><script>alert(1)</script>|\n# [y](javascript:z)\x1b[2J\u202e"
    recipe = dataclasses.replace(
        RECIPE, method=bad, ingredients=(Ingredient(bad, bad), *RECIPE.ingredients[1:]),
        params={bad: bad}, versions={bad: bad}, classes=(bad, "`"),
    )  # fmt: skip
    card = recipe.to_card()
    assert "<script" not in card
    assert not set(card) & {"\x1b", "\u202e"}
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        line for line in card.splitlines() if line.startswith("# x")
    ]
    assert card.count("\n# ") == 1
    for line in card.splitlines():
        ticks = line.replace("\\`", "").count("`")
        assert ticks % 2 == 0 or line in ("```", "```python")


@pytest.mark.parametrize(
    "live", ["https://x.org/y", "HTTP://x.org", "www.x.org", "@owner", "a@b.org", "$x^2$"]
)
def test_no_name_becomes_a_link_a_mention_or_a_formula(live):
    """GitHub makes them of plain text; in a span of code it does not."""
    recipe = dataclasses.replace(
        RECIPE, method=live, ingredients=(Ingredient(live, live), *RECIPE.ingredients[1:]),
        params={live: live}, versions={live: live}, classes=(live, "x"),
    )  # fmt: skip
    card = recipe.to_card()
    assert live in card
    text = re.sub(r"`[^`]*`", "", card)
    assert live not in text
    assert not re.search(r"(?i)[@$](?!</span>)|https?://|www\.", text)
    shown = text.replace("<span>", "").replace("</span>", "").replace("\\", "")
    assert f"# {live} of 2 checkpoints" in shown


def test_names_do_not_reach_the_terminal_as_commands(tmp_path, capsys):
    for k, state in enumerate(STATES.values()):
        save_file(state, tmp_path / f"ft{k}\x1b]0;owned\x07\nVerified: all.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "ft0\\x1b]0;owned\\x07\\nVerified: all" in printed
    assert main(["inspect", str(tmp_path / "no\x1b[2J")]) == 2
    assert "\x1b" not in capsys.readouterr().err


# ------------------------------------------------------------------ mix


@pytest.mark.parametrize(
    "row", [[1e7, -1e7], [1e300, -1e300], [0.5, 0.5 + 2e-6], np.array([1e7, -1e7], np.float32)]
)
def test_rows_that_do_not_sum_to_1(row):
    with pytest.raises(ValueError, match="must sum to 1"):
        check_coef(row, 2)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_rows_that_rounding_left_beside_1_are_taken(values, seed):
    exact = np.array([*values, 0.0])
    exact[-1] = 1 - exact.sum()
    check_coef(exact, len(exact))
    positive = np.random.default_rng(seed).uniform(size=1000).astype(np.float32)
    check_coef(positive / positive.sum(), 1000)


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize(
    ("dtype", "coef", "match"),
    [
        (
            torch.float16,
            [2.0, -1.0],
            r"'w' can't be stored: it reaches 180000, but the largest number in torch.float16 is",
        ),
        (torch.float8_e4m3fn, [200.0, -199.0], "'w' can't be stored"),
        (torch.float32, [1e300, -1e300], "'w' holds NaN or infinite values"),
        (torch.float64, [1e308, -1e308], "'w' holds NaN or infinite values"),
    ],
)
def test_a_mix_that_is_not_finite_is_named(dtype, coef, match, out, tmp_path):
    big = 6e4 if dtype != torch.float8_e4m3fn else 4.0
    nets = [{"w": torch.tensor([sign * big]).to(dtype)} for sign in (1, -1, 0.5)]
    folder = tmp_path / "mixed"
    with pytest.raises(CheckpointError, match=match):
        mix(nets, [*coef, 1 - sum(coef)], out=folder if out else None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_rounded_to_the_largest_number_is_stored():
    nets = [{"w": torch.tensor([w]).half()} for w in (65504.0, 65504.0, 65472.0)]
    assert mix(nets, [0.6, 0.6, -0.2])["w"].item() == 65504.0


def test_infinite_constants_are_still_copied():
    mask = torch.full((2, 2), -torch.inf).triu(1)
    nets = [{"w": torch.ones(1) * k, "mask": mask, "none": torch.ones(0)} for k in range(2)]
    assert torch.equal(mix(nets, [0.5, 0.5])["mask"], mask)


def test_nothing_to_check_is_not_verified():
    nets = CheckpointCollection({"a": {"w": torch.ones(3)}, "b": {"w": torch.zeros(3)}})
    document = json.loads(Recipe.record("x", nets, [0.5, 0.5], layers={"w": 0}).to_json())
    document |= {"layers": {}, "format_version": 1}
    del document["sha256"]
    found = Recipe.from_json(json.dumps(document)).verify(
        {"evil": torch.ones(1)}, {"z": {"w": torch.zeros(3)}}
    )
    assert not found.ok
