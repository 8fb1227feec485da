"""Mixes in another dtype than that of the checkpoints, and in shards of a given size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sksoup import CheckpointCollection, CheckpointError, Recipe, mix
from sksoup.exceptions import RecipeError

from ..zoo import make_states, same_tensors

COEF = [0.5, 0.3, 0.2]


@pytest.fixture
def nets():
    return CheckpointCollection(make_states(3, seed=0))


def recorded(nets, **fields):
    layers = dict.fromkeys(nets.layout, 0)
    return Recipe.record("by hand", nets, COEF, layers=layers, layer_names=("all",), **fields)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_floating_tensors_are_converted_in_one_rounding(nets, name, tmp_path):
    dtype = getattr(torch, name)
    exact = mix(nets, COEF)
    expected = {n: w.to(dtype) if w.is_floating_point() else w for n, w in exact.items()}
    assert same_tensors(mix(nets, COEF, dtype=name), expected)
    assert same_tensors(mix(nets, COEF, dtype=dtype), expected)
    recipe = Recipe.from_json(recorded(nets, dtype=name).to_json())
    assert recipe.dtype == name
    assert same_tensors(recipe.cook(nets), expected)
    recipe.cook(nets, tmp_path / "soup")
    found = load_file(tmp_path / "soup" / "model-00001-of-00001.safetensors")
    assert same_tensors({n: found[n] for n in expected}, expected)
    assert recipe.verify(tmp_path / "soup", nets).ok
    assert recipe.verify(expected, nets).ok
    assert recorded(nets).verify(expected, nets).ok == (name == "float32")


def test_checkpoints_of_two_bytes_are_summed_wide_and_rounded_once():
    states = make_states(3, seed=0, dtype=torch.bfloat16)
    nets = CheckpointCollection(states)
    found = mix(nets, COEF, dtype=torch.float32)["head.weight"]
    wide = sum(c * s["head.weight"].double() for c, s in zip(COEF, states, strict=True))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wide, rtol=1e-6, atol=1e-7)


def test_what_is_too_large_for_the_dtype_is_an_error():
    for values in ([7e4, 8e4], [7e4, 7e4]):  # a sum, and what is equal in all
        nets = CheckpointCollection([{"w": torch.tensor([v])} for v in values])
        with pytest.raises(CheckpointError, match=r"reaches 7.*largest number in torch.float16"):
            mix(nets, [0.5, 0.5], dtype="float16")
    mask = CheckpointCollection([{"w": torch.tensor([1.0, -torch.inf])}] * 2)
    assert mix(mask, [0.5, 0.5], dtype="float16")["w"].tolist() == [1.0, -np.inf]


@pytest.mark.parametrize("wrong", ["float8", "", torch.int32])
def test_other_dtypes_are_refused(nets, wrong):
    with pytest.raises(ValueError, match="is unknown: expected 'float64', 'float32'"):
        mix(nets, COEF, dtype=wrong)
    if isinstance(wrong, str):
        with pytest.raises(RecipeError, match="is unknown: expected 'float64'"):
            recorded(nets, dtype=wrong).to_json()


def test_shards_are_no_larger_than_asked_for(nets, tmp_path):
    mix(nets, COEF, out=tmp_path / "mix", shard_size=120)
    recorded(nets).cook(nets, tmp_path / "cooked", "0.12KB")
    for folder in ("mix", "cooked"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 2
        for file in files:
            state = load_file(tmp_path / folder / file)
            assert len(state) == 1 or sum(w.nbytes for w in state.values()) <= 120
    assert recorded(nets).verify(tmp_path / "cooked", nets).ok
    for wrong in ("5XB", 0):
        with pytest.raises(ValueError, match="shard_size="):
            mix(nets, COEF, out=tmp_path / "no", shard_size=wrong)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["weight", "running_var"])
@pytest.mark.parametrize("wanted", [None, "float32", "float16", "bfloat16"])
def test_tensors_of_one_byte_that_are_equal_are_converted(dtype, name, wanted):
    value = torch.tensor([0.5, 1.0, 2.0]).to(dtype)
    found = mix([{name: value}, {name: value.clone()}], [0.5, 0.5], dtype=wanted)[name]
    assert found.dtype == (dtype if wanted is None else getattr(torch, wanted))
    assert found.float().tolist() == [0.5, 1.0, 2.0]
