"""Verified here, and other weights elsewhere: what other programs would load of a soup."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, Recipe, RecipeError, UniformSoup
from sksoup.__main__ import main
from sksoup.mixing.verification import digest_of_tensors

from ..adapters import build, rows, save_adapters
from .test_configs import BERT

transformers = pytest.importorskip("transformers")


@pytest.fixture
def soup(tmp_path):
    """Two small models, the folder of their mean, and its weights."""
    config = transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "architectures"})
    torch.manual_seed(0)
    for each in "ab":
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "in" / each)
    ckpts = CheckpointCollection.from_path(tmp_path / "in")
    layers = dict.fromkeys(ckpts.layout, 0)
    recipe = Recipe.record("average", ckpts, [[0.5, 0.5]], layers=layers, layer_names=("all",))
    folder = recipe.cook(ckpts, out=tmp_path / "soup")
    shutil.copy(tmp_path / "in/a/config.json", folder)
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 0
    return folder, recipe.cook(ckpts)


def test_a_tensor_in_two_shards_is_refused(soup, tmp_path, capsys):
    folder, weights = soup
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = {n: torch.full_like(w, 7) for n, w in weights.items()}
    last = next(reversed(weights))
    other[last] = weights[last]
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    index["weight_map"][last] = "other.safetensors"
    path.write_text(json.dumps(index))
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 2
    assert "is not in the index there" in capsys.readouterr().err


def test_a_shard_with_more_than_the_index_lists_is_refused(soup):
    folder, _ = soup
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / next(iter(index["weight_map"].values()))
    save_file(load_file(shard) | {"more": torch.ones(2)}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds 'more'"):
        CheckpointCollection([folder])


@pytest.mark.parametrize(
    "fields",
    [
        {"transformers_weights": "x"},
        {"attribute_map": {"transformers_weights": "zz"}, "zz": "evil.safetensors"},
        {"configuration_files": ["config.4.0.0.json"]},
    ],
)
def test_a_config_that_names_other_weights_is_not_verified(soup, tmp_path, capsys, fields):
    folder, _ = soup
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 2
    assert "by which transformers would load other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "shard-00001-model-00001-of-00001.safetensors",  # then transformers reads all files
        "head.safetensors",  # which some classes load, too
        "model.safetensors",  # preferred to the index
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "other.safetensors.index.json",
    ],
)
def test_weights_beside_those_of_the_folder_are_not_verified(soup, tmp_path, capsys, name):
    folder, weights = soup
    recipe, runs = Recipe.load(folder), CheckpointCollection.from_path(tmp_path / "in")
    if name.endswith(".json"):
        (folder / name).write_text("{}")
    else:
        save_file({n: w + 1 for n, w in weights.items()}, folder / name)
    index = folder / "model.safetensors.index.json"
    for path in (folder, index):
        with pytest.raises((CheckpointError, RecipeError)) as caught:
            recipe.verify(path, runs)
        if path == index or name != "model.safetensors":
            assert f"{name}' lies beside" in str(caught.value)


def test_what_training_leaves_beside_weights_is_no_weights(soup, tmp_path):
    folder, _ = soup
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "tokenizer.json"):
        (folder / name).write_bytes(b"x")
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 0


def test_an_adapter_is_no_soup(soup, tmp_path):
    folder, weights = soup
    recipe, runs = Recipe.load(folder), CheckpointCollection.from_path(tmp_path / "in")
    evil = tmp_path / "evil"
    evil.mkdir()
    save_file(weights, evil / "adapter_model.safetensors")
    (evil / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    for path in (evil, evil / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="take the folder for an adapter"):
            recipe.verify(path, runs)


def test_modules_that_sentence_transformers_loads_beside_are_said(soup, tmp_path, capsys):
    folder, _ = soup
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "2_Dense"}]
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, folder / "2_Dense" / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(modules))
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 0
    said = capsys.readouterr().out
    assert "not checked: '2_Dense/model.safetensors' is loaded, too, and in no recipe" in said
    (folder / "modules.json").write_text(json.dumps(modules[1:]))
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 2
    assert "names no module in its own folder" in capsys.readouterr().err


def test_a_shard_that_is_a_container_is_refused(soup):
    folder, weights = soup
    torch.save({"state_dict": dict(weights), "x.y": torch.ones(2)}, folder / "a.bin")
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "a.bin")})
    )
    with pytest.raises(CheckpointError, match="more than a plain state dict, which a shard"):
        CheckpointCollection([folder / "pytorch_model.bin.index.json"])


@pytest.mark.filterwarnings("ignore:Adapter")
def test_rounding_is_no_excuse_for_other_kinds_or_values(tmp_path):
    save_adapters(tmp_path)
    base = build()
    base.lin.weight.data[0, 0] = 1e8  # an outlier, beside which all else is small
    adapters = CheckpointCollection.from_path(tmp_path, module=base)
    soup = UniformSoup().fit(adapters, *rows())
    state = soup.state_dict()
    w = state["lin.weight"]
    for other in (w.double(), w.expand(3, 5, *w.shape), w + 0j, w[:3, :3], w[:0], w + 1.0):
        weights = {**state, "lin.weight": other.clone()}
        recipe = dataclasses.replace(soup.recipe_, weights_sha256=digest_of_tensors(weights))
        found = recipe.verify(weights, adapters)
        assert not found.ok
        assert set(found.differing) == {"lin.weight"}


def test_a_container_is_not_verified(tmp_path):
    nets = [nn.Linear(2, 2) for _ in range(2)]
    ckpts = CheckpointCollection(nets)
    layers = dict.fromkeys(ckpts.layout, 0)
    recipe = Recipe.record("average", ckpts, [0.5, 0.5], layers=layers)
    good = recipe.cook(ckpts)
    evil = {n: w + 1 for n, w in good.items()}
    torch.save({**evil, "extra": good}, tmp_path / "soup.pt")
    with pytest.raises(CheckpointError, match="twice, beside 'extra'"):
        recipe.verify(tmp_path / "soup.pt", ckpts)
    torch.save({"extra": good}, tmp_path / "soup.pt")
    with pytest.raises(RecipeError, match="more than a plain state dict"):
        recipe.verify(tmp_path / "soup.pt", ckpts)
    torch.save(good, tmp_path / "soup.pt")
    assert recipe.verify(tmp_path / "soup.pt", ckpts).ok
