"""Files of transformers by the names of its modules: renamed and merged, read one by one."""

from __future__ import annotations

import importlib
import pickle
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sksoup import CheckpointCollection, CheckpointError, Recipe, UniformSoup, mix
from sksoup.checkpoints.converted import ConvertedCheckpoint
from sksoup.checkpoints.protocol import LONGEST_NAME
from sksoup.checkpoints.read import SafetensorsFile

from .test_hub_matrix import MODELS, N, save_runs

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    return save_runs(MODELS["ViT"][0], tmp_path_factory.mktemp("vits"))


@pytest.fixture(scope="module")
def mixtrals(tmp_path_factory):
    return save_runs(MODELS["Mixtral"][0], tmp_path_factory.mktemp("mixtrals"))


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


def loose(runs, folder):
    """The files alone, without the config.json beside them."""
    folder.mkdir()
    for run in runs.iterdir():
        (folder / f"{run.name}.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    return folder


def test_the_mean_is_that_of_what_transformers_reads(mixtrals):
    kind = transformers.MixtralForSequenceClassification
    states = [kind.from_pretrained(run).state_dict() for run in sorted(mixtrals.iterdir())]
    found = mix(CheckpointCollection.from_path(mixtrals), [1 / 3] * 3)
    for name, value in found.items():
        mean = torch.stack([state[name].double() for state in states]).mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_only_what_a_tensor_is_made_of_is_read(mixtrals, monkeypatch):
    read, original = [], SafetensorsFile._open

    @contextmanager
    def counting(self):
        with original(self) as get:
            yield lambda name: read.append(name) or get(name)

    monkeypatch.setattr(SafetensorsFile, "_open", counting)
    collection = CheckpointCollection.from_path(mixtrals)
    assert collection.layout["model.layers.0.mlp.experts.down_proj"].shape == (11, 16, 16)
    assert not read
    with collection.open("ft0") as get:
        get("model.layers.1.input_layernorm.weight")
        assert read == ["model.layers.1.input_layernorm.weight"]
        get("model.layers.1.mlp.experts.down_proj")
    assert read[1:] == [f"model.layers.1.block_sparse_moe.experts.{k}.w2.weight" for k in range(11)]


@pytest.mark.parametrize("runs", ["vits", "mixtrals"])
def test_it_goes_to_workers(runs, request):
    collection = CheckpointCollection.from_path(request.getfixturevalue(runs))
    sent = pickle.loads(pickle.dumps(collection))
    assert same(sent["ft1"], collection["ft1"])
    assert [sent.identity(name) for name in sent] == [collection.identity(n) for n in collection]
    assert sent.sha256("ft1") == collection.sha256("ft1")


def test_a_module_of_transformers_names_loose_files(vits, tmp_path):
    wanted = CheckpointCollection.from_path(vits)
    files = loose(vits, tmp_path / "loose")
    for module in (MODELS["ViT"][0](), MODELS["ViT"][0]):
        found = CheckpointCollection.from_path(files, module=module)
        assert same(found["ft1"], wanted["ft1"])
    # without an architecture there are no names but the file's; it is given later, too
    bare = CheckpointCollection.from_path(files)
    assert same(bare["ft1"], load_file(files / "ft1.safetensors"))
    assert same(CheckpointCollection(bare, module=module)["ft1"], wanted["ft1"])
    # once more changes nothing
    assert same(CheckpointCollection(wanted, names=["a", "b", "c"])["b"], wanted["ft1"])


def test_a_factory_that_can_not_be_built_without_weights_names_folders(vits):
    def load():
        return transformers.AutoModelForImageClassification.from_pretrained(vits / "ft0")

    soup = UniformSoup().fit(
        CheckpointCollection.from_path(vits, module=load), MODELS["ViT"][1](), np.arange(N) % 3
    )
    assert same(soup.state_dict(), mix(CheckpointCollection.from_path(vits), [1 / 3] * 3))


def test_checkpoints_without_the_head_are_refused(vits, tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig.from_pretrained(vits / "ft0")
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    collection = CheckpointCollection([tmp_path / "encoder"], module=MODELS["ViT"][0])
    with pytest.raises(
        CheckpointError, match=r"'classifier.weight', 'classifier.bias'\. Pass the a"
    ):
        UniformSoup().fit(collection, MODELS["ViT"][1](), np.arange(N) % 3)


def test_files_by_the_names_of_the_module_stay_as_they_are(vits, tmp_path):
    collection = CheckpointCollection.from_path(vits)
    saved = collection.save(tmp_path / "saved")
    assert same(saved["ft1"], collection["ft1"])
    assert all(isinstance(e.checkpoint, SafetensorsFile) for e in saved._entries.values())
    module = saved.build_module()
    module.load_state_dict(collection["ft1"])
    both = CheckpointCollection([module, vits / "ft1"], names=["memory", "file"])
    assert same(both["memory"], both["file"])


def test_wrappers_go_before_names_are_converted(vits, tmp_path):
    wanted = CheckpointCollection.from_path(vits)["ft1"]
    stored = load_file(vits / "ft1" / "model.safetensors")
    save_file({f"module.{n}": w for n, w in stored.items()}, tmp_path / "ddp.safetensors")
    module = MODELS["ViT"][0]
    for prefix in (None, "module."):
        found = CheckpointCollection([tmp_path / "ddp.safetensors"], module=module, prefix=prefix)
        assert same(found["ddp"], wanted)
    memory = CheckpointCollection([stored], module=module)
    assert same(memory["checkpoint0"], wanted)
    assert memory.sha256("checkpoint0") == memory.content_sha256("checkpoint0")
    assert sum(1 for _ in memory.held_tensors()) == len(stored)


def test_old_names_and_what_is_computed_at_the_start(tmp_path):
    """BERT as it was saved years ago: LayerNorm.gamma, and positions among the weights."""
    (run,) = save_runs(MODELS["BERT"][0], tmp_path / "runs", n=1).iterdir()
    wanted = CheckpointCollection([run])["ft0"]
    old = {}
    for name, value in load_file(run / "model.safetensors").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(old, run / "model.safetensors")
    assert same(CheckpointCollection([run])["ft0"], wanted)


def test_a_recipe_is_by_the_names_of_the_module(vits, tmp_path):
    X, y = MODELS["ViT"][1](), np.arange(N) % 3
    collection = CheckpointCollection.from_path(vits)
    soup = UniformSoup().fit(collection, X, y)
    recipe = soup.recipe_
    assert recipe.layers.keys() == soup.module_.state_dict().keys()
    assert same(recipe.cook(collection), soup.state_dict())
    recipe.cook(collection, out=tmp_path / "cooked")
    assert recipe.verify(tmp_path / "cooked", collection).ok
    soup.save(tmp_path / "soup.safetensors")
    assert recipe.verify(tmp_path / "soup.safetensors", collection).ok
    soup.save_pretrained(tmp_path / "soup")
    stored = load_file(tmp_path / "soup" / "model.safetensors")
    assert stored.keys() == load_file(vits / "ft0" / "model.safetensors").keys()
    assert recipe.verify(stored, collection).differing  # a dict is taken by its names
    stored["vit.encoder.layer.0.output.dense.bias"] += 1
    save_file(stored, tmp_path / "soup" / "model.safetensors")
    found = Recipe.record("by hand", collection, recipe.coef, layers=recipe.layers).verify(
        tmp_path / "soup", collection
    )
    assert list(found.differing) == ["vit.layers.0.mlp.fc2.bias"]


def test_a_recipe_by_the_names_of_files_is_cooked_from_folders(vits, tmp_path):
    bare = CheckpointCollection.from_path(loose(vits, tmp_path / "loose"))
    recipe = Recipe.record("by hand", bare, [1 / 3] * 3, layers=dict.fromkeys(bare.layout, 0))
    save_file(mix(bare, [1 / 3] * 3), tmp_path / "soup.safetensors")
    named = CheckpointCollection.from_path(vits)
    assert same(recipe.cook(named), mix(bare, [1 / 3] * 3))
    assert recipe.verify(tmp_path / "soup.safetensors", named).ok


def test_what_transformers_can_not_convert_is_named(vits, mixtrals, tmp_path):
    module = MODELS["ViT"][0]
    stored = load_file(vits / "ft0" / "model.safetensors")
    twice = stored | {"vit.layers.0.mlp.fc2.bias": torch.zeros(8)}
    with pytest.raises(CheckpointError, match=r"both correspond to"):
        CheckpointCollection([twice], module=module)
    stored = load_file(mixtrals / "ft0" / "model.safetensors")
    stored["model.layers.0.block_sparse_moe.experts.3.w2.weight"] = torch.zeros(2, 2)
    with pytest.raises(
        CheckpointError, match=r"transformers can't convert .*11 tensors.* to .*down_proj'"
    ):
        CheckpointCollection([stored], module=MODELS["Mixtral"][0])


def test_other_names_are_not_matched_and_stay(vits):
    stored = load_file(vits / "ft0" / "model.safetensors")
    long = "experts." * LONGEST_NAME
    collection = CheckpointCollection([stored | {long: torch.ones(1)}], module=MODELS["ViT"][0])
    assert long in collection.layout
    with pytest.raises(CheckpointError, match="The module does not fit the checkpoints: it lacks"):
        UniformSoup().fit(collection, MODELS["ViT"][1](), np.arange(N) % 3)


def test_other_modules_and_older_transformers_have_their_names(vits, monkeypatch):
    named = CheckpointCollection.from_path(vits)
    assert isinstance(named._entries["ft0"].checkpoint, ConvertedCheckpoint)
    assert repr(named._entries["ft0"]) == repr(str(vits / "ft0"))
    named.warm("ft0")
    bare = CheckpointCollection.from_path(vits, module=torch.nn.Linear(2, 2))
    stored = load_file(vits / "ft0" / "model.safetensors")
    assert same(bare["ft0"], stored)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    assert same(CheckpointCollection.from_path(vits)["ft0"], stored)


def test_a_conversion_under_one_name_is_for_files_of_transformers_alone(vits, monkeypatch):
    """As Qwen3-VL's experts, which are stored transposed."""
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping")
    collection = CheckpointCollection.from_path(vits)
    module = MODELS["ViT"][0]()
    name = "vit.layers.1.mlp.fc2.weight"

    def table(network):
        transpose = [loading.Transpose(0, 1)]
        return [loading.WeightConverter("1.mlp.fc2.weight", "1.mlp.fc2.weight", transpose)]

    monkeypatch.setattr(mapping, "get_model_conversion_mapping", table)
    memory = CheckpointCollection([collection["ft0"]], module=module)
    assert memory.layout[name].shape == (8, 16)
    file = vits / "ft0" / "again.safetensors"
    save_file(collection["ft0"], file)
    stored = CheckpointCollection([file], module=module)
    file.unlink()
    assert stored.layout[name].shape == (16, 8)
