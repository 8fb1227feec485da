"""Soups that are verified while other programs load other weights, and what passes as rounding."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, Recipe, RecipeError, mix
from sksoup.__main__ import main
from sksoup.checkpoints import beside, hub_config
from sksoup.checkpoints import modules as module_lists
from sksoup.checkpoints.hub_companions import copy_companions
from sksoup.checkpoints.hub_config import LIMIT
from sksoup.checkpoints.read import SafetensorsFile
from sksoup.mixing import rounding, verification

from .test_configs import BERT

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture
def parts(tmp_path):
    """The folder of a soup of two small models, its recipe, and the ingredients."""
    config = transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "architectures"})
    torch.manual_seed(0)
    for each in "ab":
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "in" / each)
    ckpts = CheckpointCollection.from_path(tmp_path / "in")
    layers = dict.fromkeys(ckpts.layout, 0)
    recipe = Recipe.record("average", ckpts, [[0.5, 0.5]], layers=layers, layer_names=("all",))
    folder = tmp_path / "soup"
    shutil.copytree(tmp_path / "in/a", folder)
    recipe.save_weights(folder / "model.safetensors", recipe.cook(ckpts))
    assert recipe.verify(folder, ckpts).ok
    return folder, recipe, ckpts


def change(path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def other(weights) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(w, 6.66) for name, w in weights.items()}


def write_other(path) -> None:
    path.parent.mkdir(exist_ok=True)
    weights = load_file(next(path.parents[k] / "model.safetensors" for k in range(2)
                             if (path.parents[k] / "model.safetensors").exists()))  # fmt: skip
    save_file(other(weights), path, {"format": "pt"})


# ------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"transformers_weights": "evil.safetensors"}),
        ("config.json", {"attribute_map": {"transformers_weights": "z"}, "z": "evil.safetensors"}),
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}),
        ("config.json", {"pretrained_cfg": {"hf_hub_filename": "extra/evil.safetensors"}}),
        ("config.json", {"pretrained_cfg": {"custom_load": True}}),
        ("config.json", {"architecture": "resnet18", "hf_hub_filename": "data/w.bin"}),
        ("config.json", {"model_args": {"checkpoint_path": "evil.safetensors"}}),
        ("sentence_bert_config.json", {"config_args": {"transformers_weights": "x/y.safetensors"}}),
        ("sentence_xlnet_config.json", {"config_kwargs": {"attribute_map": {"a": "b"}}}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_configs_that_name_other_files_are_not_verified(parts, name, fields):
    folder, recipe, ckpts = parts
    path = folder / name
    if not path.exists():
        path.write_text("{}")
    change(path, **fields)
    for weights in (folder, folder / "model.safetensors"):
        with pytest.raises(
            CheckpointError, match=r"config\.json' refers to other weights .*Remove that"
        ):
            recipe.verify(weights, ckpts)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_tensors_that_only_other_versions_read_are_named(parts, name):
    """transformers computes these buffers; before 4.31, it loaded them."""
    folder, recipe, ckpts = parts
    recipe = Recipe.load(folder)
    file = folder / "model.safetensors"
    recipe.save_weights(file, recipe.cook(ckpts))
    assert recipe.verify(folder, ckpts).ok
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    added = {f"bert.embeddings.{name}": torch.arange(8).flip(0)[None]}
    save_file({**load_file(file), **added}, file, metadata)
    found = recipe.verify(folder, ckpts)
    assert not found.ok
    assert found.differing == {f"bert.embeddings.{name}": "is not in the recipe"}
    assert found.sha256 == "differs"


def test_an_ingredient_that_is_replaced_for_a_moment_is_noticed(tmp_path, monkeypatch):
    """Its size, time and inode are the same before and after it is read."""
    for name, value in (("a", 1.0), ("b", 2.0), ("evil", 666.0)):
        save_file({"w": torch.full((4,), value)}, tmp_path / f"{name}.safetensors")
    ckpts = CheckpointCollection([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    recipe = Recipe.record("average", ckpts, [[0.5, 0.5]], layers={"w": 0}, layer_names=("all",))
    good, evil, away = (tmp_path / f"{n}.safetensors" for n in ("a", "evil", "away"))
    opened = SafetensorsFile._open

    @contextmanager
    def replaced(self):
        if self.file == good:
            good.rename(away)
            evil.rename(good)
        with opened(self) as read:
            if self.file == good:
                good.rename(evil)
                away.rename(good)
            yield read

    soup = {"w": torch.full((4,), (666 + 2) / 2)}
    assert not recipe.verify(soup, ckpts).ok
    monkeypatch.setattr(SafetensorsFile, "_open", replaced)
    with pytest.raises(
        RecipeError, match=r"a\.safetensors' changed while it was compared, or was replaced"
    ):
        recipe.verify(soup, ckpts)


ARGUMENTS = [
    {"model_args": {"variant": "/evil"}},
    {"model_kwargs": {"key_mapping": {r"layer\.0\.": "layer.1."}}},
    {"model_args": {"adapter_kwargs": {"subfolder": "sub"}}},
    {"model_args": {"state_dict": {}}},
    {"model_args": {"dtype": {"": "float32"}}},
    {"config_args": {"name_or_path": "../other"}},
    {"config_kwargs": {"gguf_file": "x.gguf"}},
    {"model_args": ["variant"]},
    {"other_kwargs": {"subfolder": "sub"}},
    {"backend": "onnx"},
]


@pytest.mark.parametrize("fields", ARGUMENTS, ids=json.dumps)
def test_arguments_by_which_other_weights_are_loaded_are_not_verified(parts, tmp_path, fields):
    folder, recipe, ckpts = parts
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": 8, **fields}))
    for weights in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"bert_config\.json' (passes|makes) .*Remove"):
            recipe.verify(weights, ckpts)
    with pytest.raises(CheckpointError, match=r"Remove"):  # nor passed on into a soup's folder
        copy_companions(folder, tmp_path)


def test_ordinary_arguments_of_sentence_transformers_are_verified(parts, tmp_path):
    folder, recipe, ckpts = parts
    fields = {
        "max_seq_length": 8, "do_lower_case": False, "transformer_task": "feature-extraction",
        "model_args": {"torch_dtype": "float16", "attn_implementation": "sdpa", "variant": None},
        "model_kwargs": {"add_pooling_layer": True, "trust_remote_code": True},
        "config_args": {}, "config_kwargs": {"num_labels": 1, "reference_compile": False},
        "tokenizer_args": {"padding_side": "left"}, "processing_kwargs": {"text": {"padding": 8}},
        "modality_config": {"text": {"method": "forward"}}, "backend": "torch",
    }  # fmt: skip
    (folder / "sentence_bert_config.json").write_text(json.dumps(fields))
    assert recipe.verify(folder, ckpts).ok
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text()) == fields


def test_no_module_is_built_from_a_config_that_names_another(parts):
    folder, _, _ = parts
    change(folder / "config.json", configuration_files=["config.4.0.0.json"])
    with pytest.raises(CheckpointError, match="'configuration_files'"):
        CheckpointCollection([folder]).build_module()


@pytest.mark.parametrize("text", [" " * LIMIT + "{}", "[" * 100_000])
def test_a_config_that_can_not_be_read_is_not_verified(parts, text):
    """Transformers has no limit: what is not read here may be read there."""
    folder, recipe, ckpts = parts
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json' can't be"):
        recipe.verify(folder, ckpts)


# ------------------------------------------------------------------ names that are not loaded


@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize(
    "rename",
    [lambda n: f"module.{n}", lambda n: f"_orig_mod.{n}", lambda n: f"model.{n}",
     lambda n: f"bert.{n}", lambda n: f"bert.bert.{n}", lambda n: n.removeprefix("bert.")],
    ids=["module", "_orig_mod", "model", "base", "twice", "without"],
)  # fmt: skip
def test_what_is_verified_is_what_transformers_loads(parts, tmp_path, rename, is_base):
    """It loads nothing behind a wrapper's prefix, but gives and takes that of the base."""
    folder, recipe, ckpts = parts
    kind = transformers.BertForSequenceClassification
    if is_base:
        kind = transformers.BertModel
        for each in "ab":
            kind.from_pretrained(tmp_path / "in" / each).save_pretrained(tmp_path / "bases" / each)
        ckpts = CheckpointCollection.from_path(tmp_path / "bases")
        layers = dict.fromkeys(ckpts.layout, 0)
        recipe = Recipe.record("average", ckpts, [0.5, 0.5], layers=layers)
        shutil.copy(tmp_path / "bases/a/config.json", folder)
    good = recipe.cook(ckpts)
    save_file(
        {rename(n): w for n, w in good.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    state = kind.from_pretrained(folder).state_dict()
    is_loaded = all(torch.equal(state[name], w) for name, w in good.items())
    findings = recipe.verify(folder, ckpts)
    assert findings.ok == is_loaded
    assert is_loaded or findings.differing


# ------------------------------------------------------------------ other files in the folder


@pytest.mark.parametrize(
    "name",
    ["head.safetensors", "shard-00001-model-00001-of-00001.safetensors", "pytorch_model.bin",
     "MODEL.SAFETENSORS", "model.safetensors.index.json", "adapter_config.json", "x.gguf",
     "params.pt", "last.ckpt", "model.onnx", "rust_model.ot", "weights.npz", "model_head.pkl",
     "x.pth.tar", "model.neuron", "pipeline.skops", "pytorch_model.bin.index.fp16.json"],
)  # fmt: skip
def test_other_weights_in_the_folder_are_named(parts, capsys, name):
    folder, recipe, ckpts = parts
    (folder / name).write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    findings = recipe.verify(folder / "model.safetensors", ckpts)
    assert not findings.ok
    assert findings.differing == {}
    assert findings.beside == (name,)
    assert f"not compared: {name!r} is also in the folder" in str(findings)
    assert "NOT verified" in str(findings)
    if name != "adapter_config.json":  # opens as an adapter, or not at all
        assert recipe.verify(folder, ckpts).beside == (name,)
        assert main(["verify", str(folder), str(folder.parent / "in")]) == 1
        assert repr(name) in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "onnx/model.onnx",
        "openvino/openvino_model.bin",
        "onnx/sub/model.safetensors",
        "x/model.onnx",
        ".hidden/y/Model.ONNX",
        "x/openvino_model.xml",
        "checkpoint-5/model.pte",
    ],
)
def test_weights_of_other_runtimes_in_the_folder_are_named(parts, name):
    folder, recipe, ckpts = parts
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"weights")
    (folder / name).with_suffix(".json").write_text("{}")
    assert recipe.verify(folder, ckpts).beside == (name,)


def test_weights_of_a_pipeline_in_the_folder_are_named(parts):
    """diffusers loads those in the folders below."""
    folder, recipe, ckpts = parts
    (folder / "unet").mkdir()
    save_file({"w": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert recipe.verify(folder, ckpts).beside == ()
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    assert recipe.verify(folder, ckpts).beside == ("unet/diffusion_pytorch_model.safetensors",)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("decision.json", "adapter"),
        ("judge_config.json", "adapter_subfolder"),
        ("export.json", "components"),
    ],
)
def test_what_other_configs_name_are_other_weights(parts, name, field):
    """transformers loads an adapter from the folder that is named, or from `adapter`."""
    folder, recipe, ckpts = parts
    (folder / "adapter").mkdir()
    save_file({"w": torch.zeros(1)}, folder / "adapter" / "adapter_model.safetensors")
    (folder / name).write_text("{}")
    found = ("adapter/adapter_model.safetensors",) if field == "adapter_subfolder" else ()
    assert recipe.verify(folder, ckpts).beside == found
    (folder / name).write_text(json.dumps({field: "../extra"}))
    with pytest.raises(CheckpointError, match=rf"{name}' refers to other weights .*{field}"):
        recipe.verify(folder, ckpts)
    no_number = f'{{"{field}": {"1" * 5000}}}'  # for Python
    for text in ('{"id": 1}\n{"id": 2}', "[" * 100_000, no_number, "[]", '{"components": {}}'):
        (folder / name).write_text(text)
        assert recipe.verify(folder, ckpts).ok == (field != "adapter_subfolder")
    (folder / name).unlink()
    exported = json.dumps({"components": {"model": {"file": "model.pt2"}}})
    (ckpts.path(ckpts.names[0]) / "export.json").write_text(exported)  # without its program
    out = folder.parent / "out"
    assert main(["average", *[str(ckpts.path(one)) for one in ckpts], "-o", str(out)]) == 0
    assert not (out / "export.json").exists()


@pytest.mark.parametrize("name", ["model.onnx", ".x/model.onnx", ".x/model.safetensors"])
def test_whole_models_in_a_module_are_other_weights(parts, name):
    """optimum takes an .onnx file of any folder, also if an ingredient has it."""
    folder, recipe, ckpts = parts
    for each in (folder, *map(ckpts.path, ckpts)):
        modules(each, "", "1_Pooling")
        (each / "1_Pooling" / name).parent.mkdir(parents=True)
        if "onnx" in name or each == folder:
            (each / "1_Pooling" / name).write_bytes(b"weights")
    assert recipe.verify(folder, ckpts).beside == (f"1_Pooling/{name}",)
    out = folder.parent / "out"
    assert main(["average", *[str(ckpts.path(one)) for one in ckpts], "-o", str(out)]) == 0
    assert [*out.rglob("*.onnx")] == []


@pytest.mark.parametrize("mark", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("first", [(), ("",)])
def test_another_network_in_place_of_the_mixed_one(parts, first, mark):
    """modules.json of both ingredients names one of their own; it would be loaded, not the mean."""
    folder, recipe, ckpts = parts
    for each in (*map(ckpts.path, ckpts), folder):
        (each / "0_T").mkdir()
        shutil.copy(each / "model.safetensors", each / "0_T")
        if mark == "config.json":
            shutil.copy(each / mark, each / "0_T")
        (each / "0_T" / mark).touch()
        modules(each, *first, "0_T")
    out = folder.parent / "out"
    assert main(["average", *[str(ckpts.path(one)) for one in ckpts], "-o", str(out)]) == 2
    assert not out.exists()
    said = "is a network of its own among the modules" if first else "does not list its own folder"
    with pytest.raises(CheckpointError, match=said):
        recipe.verify(folder, ckpts)


@pytest.mark.parametrize(
    ("kinds", "match"),
    [
        ({"0_T": "Dense", "": "Normalize"}, "does not list its own folder"),
        ({"": "Normalize", "0_T": "sentence_transformers.models.WordEmbeddings"}, "a network of"),
        ({"": "Transformer", "0_T": "sentence_transformers.SentenceTransformer"}, "a network of"),
        ({"": "Transformer", "0_T": "Dense"}, "a network of"),  # with an index, and a shard below
    ],
)
def test_a_network_behind_another_kind_of_module(parts, kinds, match):
    folder, recipe, ckpts = parts
    for each in (*map(ckpts.path, ckpts), folder):
        (each / "0_T" / "s").mkdir(parents=True)
        modules(each, **kinds)
        if match == "a network of" and "Dense" in kinds.values():
            save_file({"w": torch.ones(2)}, each / "0_T" / "s" / "x")
            index = each / "0_T" / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": {"w": "s/x"}}))
            (each / "0_T" / "tokenizer.json").touch()
    with pytest.raises(CheckpointError, match=match):
        recipe.verify(folder, ckpts)


def test_two_modules_of_one_name(parts):
    """Of which sentence-transformers takes the last."""
    folder, recipe, ckpts = parts
    listed = [{"name": "0", "path": path, "type": "x"} for path in ("", "1_Dense")]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="two modules of one name"):
        recipe.verify(folder, ckpts)


@pytest.mark.parametrize("listing", ["config.json", "router_config.json"])
def test_routes_that_no_router_uses(parts, listing):
    """They do not make another network a route."""
    folder, recipe, ckpts = parts
    network = shutil.copytree(ckpts.path("a"), folder.parent / "network")
    for each in (*map(ckpts.path, ckpts), folder):
        shutil.copytree(network, each / "0_T")
        modules(each, "", "0_T")
        (each / listing).write_text(json.dumps({"types": {"": "x", "0_T": "x"}}))
    with pytest.raises(CheckpointError, match="is a network of its own among the modules"):
        recipe.verify(folder, ckpts)


@pytest.mark.parametrize("kind", ["Dense", "StaticEmbedding"])
def test_a_router_after_the_network(parts, kind):
    """Heads of the two sides of a search are one, other networks are not."""
    folder, recipe, ckpts = parts
    for each in (*map(ckpts.path, ckpts), folder):
        for head in ("query_0_Dense", "document_0_Dense"):
            (each / "2_Router" / head).mkdir(parents=True)
            save_file({"w": torch.ones(2)}, each / "2_Router" / head / "model.safetensors")
        modules(each, **{"": "x.Transformer", "2_Router": "x.Router"})
        types = {"query_0_Dense": f"x.{kind}", "document_0_Dense": "x.Dense"}
        router(each / "2_Router", types, {name[:-8]: [name] for name in types})
    if kind == "Dense":
        assert recipe.verify(folder, ckpts).ok
    else:
        with pytest.raises(CheckpointError, match="is a network of its own among the modules"):
            recipe.verify(folder, ckpts)


def test_what_macos_writes_beside_a_file_is_not_listed(parts):
    folder, recipe, ckpts = parts
    (folder / "._model.safetensors").write_bytes(b"\0\5\26\7\0\2")
    assert recipe.verify(folder, ckpts).ok
    write_other(folder / "._other.safetensors")
    assert recipe.verify(folder, ckpts).beside == ("._other.safetensors",)


@pytest.mark.parametrize("structure", [{"query": ["0_T"]}, {"query": ["0_T", ""]}, {"query": []}])
def test_a_router_without_a_route_of_the_network(parts, structure):
    folder, recipe, ckpts = parts
    for each in (*map(ckpts.path, ckpts), folder):
        (each / "0_T").mkdir()
        modules(each, **{"": "sentence_transformers.models.Router"})
        router(each, {"": "x", "0_T": "x"}, structure)
    with pytest.raises(CheckpointError, match=r"router_config\.json' does not list its own folder"):
        recipe.verify(folder, ckpts)
    router(folder, {"": "x", "0_T": "x"}, {"query": ["0_T"], "document": [""]})
    assert recipe.verify(folder, ckpts).ok
    # its outputs replace those of the network
    router(folder, {"": "x", "0_T": "x.Transformer"}, {"query": ["0_T"], "document": ["", "0_T"]})
    with pytest.raises(CheckpointError, match="is a network of its own among the modules"):
        recipe.verify(folder, ckpts)
    router(folder, {"": "x", "0_T": "x"}, {"query": 3})
    with pytest.raises(CheckpointError, match=r"router_config\.json' can't be read"):
        recipe.verify(folder, ckpts)


@pytest.mark.parametrize("is_used", [True, False])
def test_routes_of_a_router_may_be_networks_beside_that_of_the_folder(parts, is_used):
    """As of sparse models, whose queries have a static embedding."""
    folder, recipe, ckpts = parts
    for each in (*map(ckpts.path, ckpts), folder):
        (each / "query").mkdir()
        shutil.copy(ckpts.path("a") / "model.safetensors", each / "query")
        (each / "query" / "tokenizer.json").write_text("{}")
        modules(each, **{"": "sentence_transformers.models.Router"})
        router(each, {"query": "StaticEmbedding", **({"": "MLMTransformer"} if is_used else {})})
    if is_used:
        assert recipe.verify(folder, ckpts).ok
    else:
        with pytest.raises(CheckpointError, match="does not list its own folder"):
            recipe.verify(folder, ckpts)


def test_files_that_ingredients_lack_are_not_looked_for_in_each(parts):
    folder, recipe, ckpts = parts
    for each in (*map(ckpts.path, ckpts), folder):
        modules(each, "", "1_Pooling")
        (each / "1_Pooling").mkdir()
    for k in range(50):
        (folder / "1_Pooling" / f"{k}.bin").touch()
    with patch.object(beside, "same_content", wraps=beside.same_content) as same:
        assert len(recipe.verify(folder, ckpts).beside) == 50
    assert same.call_count == 0


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_configs_that_are_links_to_one_file_are_parsed_once(parts, link):
    folder, recipe, ckpts = parts
    names = [f"{k}_Pooling" for k in range(5)]
    for each in (*map(ckpts.path, ckpts), folder):
        modules(each, "", *names)
        for name in names:
            (each / name).mkdir()
            (each / name / "module.bin").write_bytes(b"weights")
    shared = folder.parent / "shared.json"
    shared.write_text("{}")
    for k, name in enumerate(names):
        link(shared, folder / name / "config.json")
        link(shared, folder / f"sentence_{k}_config.json")
    with (
        patch.object(module_lists, "read_text", wraps=module_lists.read_text) as of_modules,
        patch.object(module_lists, "read_json", wraps=module_lists.read_json) as of_networks,
        patch.object(hub_config, "read_text", wraps=hub_config.read_text) as of_weights,
    ):
        assert recipe.verify(folder, ckpts).ok
    read = [call.args[0].name for call in of_modules.call_args_list]
    assert read.count("config.json") <= 2  # that of the folder
    assert of_networks.call_count == 1
    read = [call.args[0].name for call in of_weights.call_args_list]
    assert [name for name in read if name != "config.json"] == ["sentence_0_config.json"]


@pytest.mark.parametrize("file", ["config.json", "modules.json", "1_Pooling/config.json"])
def test_a_file_whose_time_is_put_back_is_read_again(parts, file):
    folder, recipe, ckpts = parts
    for each in (*map(ckpts.path, ckpts), folder):
        modules(each, "", "1_Pooling")
        (each / "1_Pooling").mkdir()
        (each / "1_Pooling" / "config.json").write_text("{}")
    path = folder / file
    good = path.read_text()
    bad = '{"transformers_weights": "other.safetensors"}'
    if file == "modules.json":
        bad = good.replace("1_Pooling", "../pools")
    length = max(len(good), len(bad))
    path.write_text(good.ljust(length))
    assert recipe.verify(folder, ckpts).ok
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # clocks of file systems are coarse
        path.write_text(bad.ljust(length))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, length)
    with pytest.raises(CheckpointError):
        recipe.verify(folder, ckpts)


def test_many_files_of_runtimes_take_linear_time(parts):
    folder, recipe, ckpts = parts
    modules(folder, "", "1_Pooling")
    (folder / "1_Pooling").mkdir()
    for k in range(5_000):
        (folder / "1_Pooling" / f"{k}.onnx").touch()
    with patch.object(
        type(folder), "__eq__", autospec=True, side_effect=type(folder).__eq__
    ) as same:
        assert len(recipe.verify(folder, ckpts).beside) == 5_000
    assert same.call_count < 100_000


def test_an_index_beside_a_file_that_is_preferred_to_it(parts):
    folder, recipe, ckpts = parts
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(ckpts.layout, shard)}))
    assert recipe.verify(index, ckpts).ok
    assert recipe.verify(folder, ckpts).ok
    save_file(other(load_file(folder / shard)), folder / "model.safetensors", {"format": "pt"})
    assert recipe.verify(index, ckpts).beside == ("model.safetensors",)


def test_what_training_leaves_beside_a_soup_is_no_other_weights(parts):
    folder, recipe, ckpts = parts
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth", "README.md",
                 "scores.npz", "history.json"):  # fmt: skip
        (folder / name).write_bytes(b"x")
    (folder / "checkpoint-10").mkdir()
    write_other(folder / "checkpoint-10" / "model.safetensors")
    assert recipe.verify(folder, ckpts).ok


@pytest.mark.parametrize(
    "name",
    ["criterion.safetensors", "optimizer.safetensors", "scheduler.pth", "optimizer.bin"],
)
def test_weights_named_as_files_of_a_training_loop(parts, name):
    """timm takes the first file where no name that it prefers is there; vLLM reads all."""
    folder, recipe, ckpts = parts
    write_other(folder / name)
    beside = recipe.verify(folder / "model.safetensors", ckpts).beside
    assert beside == ((name,) if name.endswith(".safetensors") else ())
    (folder / "model.safetensors").rename(folder / "soup.safetensors")
    assert recipe.verify(folder / "soup.safetensors", ckpts).beside == (name,)


def test_files_of_a_folder_that_is_no_model_stand_alone(parts, tmp_path):
    folder, recipe, ckpts = parts
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in ("soup.safetensors", "other.safetensors"):
        shutil.copy(folder / "model.safetensors", runs / name)
    (runs / "last.pt").write_bytes(b"x")
    (runs / "history.json").write_text("[]")
    assert recipe.verify(runs / "soup.safetensors", ckpts).ok
    for config, is_model in (
        ('{"lr": 0.001, "model": "resnet"}', False),  # settings of an experiment
        ('{"model_type": "bert"}', True),
        ('{"_class_name": "UNet2DModel"}', True),
        ("{", True),
    ):
        (runs / "config.json").write_text(config)
        assert recipe.verify(runs / "soup.safetensors", ckpts).ok != is_model
    (runs / "config.json").unlink()
    for mark in ("open_clip_config.json", "model_index.json", "config_sentence_transformers.json"):
        (runs / mark).write_text("{}")
        assert not recipe.verify(runs / "soup.safetensors", ckpts).ok
        (runs / mark).unlink()


def test_a_folder_of_skorch_is_a_model(parts, tmp_path):
    """Its checkpoints are params.pt by default, whatever lies beside that."""
    folder, recipe, ckpts = parts
    skorch = tmp_path / "skorch"
    skorch.mkdir()
    for name in ("optimizer.pt", "train_end_optimizer.pt", "criterion.pt", "history.json"):
        (skorch / name).write_text("[]")
    for name in ("params.safetensors", "soup.safetensors"):
        shutil.copy(folder / "model.safetensors", skorch / name)
    (skorch / "soup.safetensors").rename(tmp_path / "soup.safetensors")
    for weights in (skorch, skorch / "params.safetensors"):
        assert recipe.verify(weights, ckpts).ok
    torch.save(other(recipe.cook(ckpts)), skorch / "params.pt")
    for weights in (skorch, skorch / "params.safetensors"):
        assert recipe.verify(weights, ckpts).beside == ("params.pt",)
    (tmp_path / "soup.safetensors").rename(skorch / "soup.safetensors")
    (skorch / "params.safetensors").unlink()
    assert recipe.verify(skorch / "soup.safetensors", ckpts).beside == ("params.pt",)


def modules(folder, *paths, **kinds) -> None:
    kinds = dict.fromkeys(paths, "x") | kinds
    listed = [{"idx": k, "name": str(k), "path": path, "type": kind}
              for k, (path, kind) in enumerate(kinds.items())]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))


def router(folder, types, structure=None) -> None:
    listed = {"types": types, **({"structure": structure} if structure else {})}
    (folder / "router_config.json").write_text(json.dumps(listed))


def test_modules_that_are_not_those_of_the_ingredients(parts):
    folder, recipe, ckpts = parts
    folders = [ckpts.path(name) for name in ckpts]
    for each in (folder, *folders):
        modules(each, "", "1_Pooling", "2_Dense")
        for name in ("1_Pooling", "2_Dense"):
            (each / name).mkdir()
            (each / name / "config.json").write_text("{}")
        save_file({"linear.weight": torch.ones(2, 2)}, each / "2_Dense" / "model.safetensors")
        write_other(each / "3_Later" / "model.safetensors")
    assert recipe.verify(folder, ckpts).ok  # the third is no module
    save_file({"linear.weight": torch.zeros(2, 2)}, folder / "2_Dense" / "model.safetensors")
    (folder / "1_Pooling" / "adapter_config.json").write_text("{}")
    found = recipe.verify(folder, ckpts)
    assert found.beside == ("1_Pooling/adapter_config.json", "2_Dense/model.safetensors")
    assert not found.ok
    shutil.copytree(folders[0], folder, dirs_exist_ok=True)
    recipe.save_weights(folder / "model.safetensors", recipe.cook(ckpts))
    (folder / "1_Pooling" / "adapter_config.json").unlink()
    assert recipe.verify(folder, ckpts).ok
    modules(folder, "", "3_Later")
    assert recipe.verify(folder, ckpts).beside == ("3_Later/model.safetensors",)
    modules(folder, "", "..")
    with pytest.raises(CheckpointError, match=r"lists the module '\.\.', expected a folder next"):
        recipe.verify(folder, ckpts)
    modules(folder, "3_Later")  # another network in place of this one
    with pytest.raises(CheckpointError, match="does not list its own folder"):
        recipe.verify(folder, ckpts)
    modules(folder, "", "1_Pooling")
    change(folder / "1_Pooling" / "config.json", transformers_weights="x.safetensors")
    with pytest.raises(CheckpointError, match="'transformers_weights'"):
        recipe.verify(folder, ckpts)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"path": "model"}))
    assert recipe.verify(folder, ckpts).ok
    pooling.write_text(json.dumps({"path": "/elsewhere/idf.json"}))
    with pytest.raises(CheckpointError, match=r"refers to other weights .*'path'"):
        recipe.verify(folder, ckpts)


@pytest.mark.parametrize("name", ["router_config.json", "config.json"])
def test_routes_are_modules(parts, name):
    folder, recipe, ckpts = parts
    modules(folder, **{"": "sentence_transformers.models.Router", "1_Pooling": "x"})
    (folder / name).touch()
    routes = {"": "Transformer", "query": "sentence_transformers.models.Router"}
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text() or "{}")
                                          | {"types": routes}))  # fmt: skip
    assert recipe.verify(folder, ckpts).ok  # there is no such folder
    (folder / "query").mkdir()
    (folder / "query" / "router_config.json").write_text('{"types": {"deep": "Transformer"}}')
    elsewhere = folder.parent / "elsewhere"  # folders that are links are not walked through
    elsewhere.mkdir()
    (folder / "query" / "deep").symlink_to(elsewhere)
    save_file(other(load_file(folder / "model.safetensors")), elsewhere / "model.safetensors")
    assert recipe.verify(folder, ckpts).beside == ("query/deep/model.safetensors",)
    (elsewhere / "sentence_bert_config.json").write_text(json.dumps(ARGUMENTS[0]))
    with pytest.raises(CheckpointError, match=r"deep/sentence_bert_config\.json' passes"):
        recipe.verify(folder, ckpts)


def test_the_file_of_an_adapter_is_no_whole_model(parts):
    folder, recipe, ckpts = parts
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    fields = {"peft_type": "LORA", "r": 1, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(RecipeError, match=r"is a PEFT adapter, which can't be verified"):
            recipe.verify(path, ckpts)


def test_a_shard_that_is_a_container_is_refused(parts):
    folder, recipe, ckpts = parts
    good = recipe.cook(ckpts)
    first, *rest = good
    evil = {n.removeprefix("bert."): w for n, w in other(good).items() if n.startswith("bert.")}
    torch.save({first: good[first]}, folder / "1.bin")
    torch.save({"state_dict": {n: good[n] for n in rest}, **evil}, folder / "2.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(
        json.dumps({"weight_map": {n: "1.bin" if n == first else "2.bin" for n in good}})
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2\.bin' can't be used as a shard: it holds more"):
        recipe.verify(folder, ckpts)
    torch.save({n: good[n] for n in rest}, folder / "2.bin")
    assert recipe.verify(folder, ckpts).ok


def write_sentence_model(folder, weight, dense):
    """A folder of sentence-transformers with weights in a further module."""
    kinds = {"": "Transformer", "2_Dense": "Dense"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"}
              for path, kind in kinds.items()]  # fmt: skip
    (folder / "2_Dense").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.full((4,), weight)}, folder / "model.safetensors")
    save_file({"linear": torch.full((2,), dense)}, folder / "2_Dense" / "model.safetensors")


def test_modules_are_compared_with_those_of_used_ingredients_only(tmp_path, capsys):
    runs = tmp_path / "runs"
    write_sentence_model(runs / "a", 1.0, 0.5)
    write_sentence_model(runs / "b", 2.0, 0.5)
    soup, inside = tmp_path / "soup", runs / "soup"
    assert main(["average", str(runs / "a"), str(runs / "b"), "-o", str(soup)]) == 0
    assert main(["verify", str(soup), str(runs)]) == 0
    other = soup / "2_Dense" / "model.safetensors"
    save_file({"linear": torch.full((2,), 666.0)}, other)
    write_sentence_model(runs / "stranger", 3.0, 666.0)
    assert main(["verify", str(soup), str(runs)]) == 1
    shutil.copytree(soup, inside)
    assert main(["verify", str(inside), str(runs)]) == 1
    assert capsys.readouterr().out.count("2_Dense/model.safetensors' is also in the folder") == 2


def test_a_rebuilt_soup_has_no_configuration_of_a_stranger(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for k in range(2):
        save_file({"w": torch.full((4,), float(k))}, runs / f"{k}.safetensors")
    assert main(["average", str(runs), "-o", str(tmp_path / "soup.safetensors")]) == 0
    write_sentence_model(runs / "stranger", 3.0, 666.0)
    soup, out = str(tmp_path / "soup.safetensors"), tmp_path / "out"
    assert main(["cook", soup, str(runs), "-o", str(out)]) == 0
    assert not [*out.glob("*config*"), *out.glob("modules*")]


def test_a_folder_of_many_indices_is_looked_at_once(tmp_path, monkeypatch):
    for k in range(5):
        save_file({"w": torch.full((4,), float(k))}, tmp_path / f"{k}.safetensors")
        index = {"weight_map": {"w": f"{k}.safetensors"}}
        (tmp_path / f"{k}.safetensors.index.json").write_text(json.dumps(index))
    ckpts = CheckpointCollection.from_path(tmp_path)
    recipe = Recipe.record("average", ckpts, np.full(5, 0.2), layers={"w": 0})
    good = recipe.cook(ckpts)
    looked, original = [], verification._stamp
    monkeypatch.setattr(
        verification, "_stamp", lambda path: looked.append(path.name) or original(path)
    )
    (tmp_path / "events.log").write_text("a file of another program")
    assert recipe.verify(good, ckpts).ok
    assert len(looked) == 2 * 10  # before and after
    monkeypatch.setattr(
        verification, "_stamp", lambda path: path.unlink(missing_ok=True) or original(path)
    )
    with pytest.raises(CheckpointError, match="can't be opened: No such file"):
        recipe.verify(good, ckpts)


# ------------------------------------------------------------------ rounding


@pytest.fixture
def adapters(tmp_path):
    """Two adapters, their base, and the recipe of their mean."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.no_grad():
        base[0].weight[0, 0] = 1e8
    for k in range(2):
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0", "1"])
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(tmp_path / f"a{k}"))
    ckpts = CheckpointCollection([tmp_path / "a0", tmp_path / "a1"], module=base)
    layers = dict.fromkeys(ckpts.layout, 0)
    return Recipe.record("average", ckpts, np.array([0.5, 0.5]), layers=layers), ckpts


@pytest.mark.parametrize(
    "change_to",
    [
        lambda w: w.double(),
        lambda w: w.to(torch.complex64) + 1e9j,
        lambda w: w.expand(3, 5, 8, 8).clone(),
        lambda w: torch.zeros(3, 3),
        lambda w: torch.zeros(0, 8),
    ],
    ids=["dtype", "complex", "dimensions", "shape", "empty"],
)
def test_another_kind_of_tensor_is_not_rounding(adapters, change_to):
    recipe, ckpts = adapters
    weights = recipe.cook(ckpts)
    weights["0.weight"] = change_to(weights["0.weight"])
    findings = recipe.verify(weights, ckpts)
    assert findings.rounded == ()
    assert "expected torch.float32 of (8, 8)" in findings.differing["0.weight"]


@pytest.mark.parametrize("most", [100, 1])
def test_each_adapter_is_opened_once_for_all_products_that_differ(adapters, monkeypatch, most):
    monkeypatch.setattr(rounding, "MOST_OPEN", most)
    recipe, ckpts = adapters
    good, opened = recipe.cook(ckpts), []
    for n_differ in (1, 2):
        given = {name: w.clone() for name, w in good.items()}
        for name in ("0.weight", "1.weight")[:n_differ]:
            given[name][1, 1] = torch.nextafter(given[name][1, 1], torch.tensor(1e9))
        with patch.object(CheckpointCollection, "open_factors", autospec=True,
                          side_effect=CheckpointCollection.open_factors) as looks:  # fmt: skip
            findings = recipe.verify(given, ckpts)
        assert findings.ok
        assert len(findings.rounded) == n_differ
        opened.append(looks.call_count)
    assert opened[1] - opened[0] == (0 if most == 100 else len(ckpts))


def test_beside_a_large_number_others_are_as_near_as_anywhere(adapters):
    recipe, ckpts = adapters
    good = recipe.cook(ckpts)
    value = good["0.weight"].clone()
    for k, factor in enumerate((1 - 2**-23, 1 + 2**-23)):
        value[k] *= factor
    assert recipe.verify({**good, "0.weight": value}, ckpts).rounded == ("0.weight",)
    for wrong in (value[3] + 1e-4, -value[3], value[3] * torch.nan, value[3] + torch.inf):
        changed = value.clone()
        changed[3] = wrong
        findings = recipe.verify({**good, "0.weight": changed}, ckpts)
        assert findings.differing == {"0.weight": "has other values"}
        assert not findings.ok


@pytest.mark.parametrize("case", ["canceling", "many", "beside a whole model"])
def test_a_recipe_can_not_choose_how_much_is_rounding(adapters, tmp_path, case):
    """Coefficients that cancel out, or one adapter a thousand times: the soup is the same mean."""
    recipe, ckpts = adapters
    coef = [0.5, 0.5]
    if case == "beside a whole model":  # each is rounded as it is stored: to 8 bits
        whole = {n: w.bfloat16() for n, w in recipe.cook(ckpts).items()}
        save_file(whole, tmp_path / "whole.safetensors")
        paths = [tmp_path / "a0", tmp_path / "a1", tmp_path / "whole.safetensors"]
        network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).bfloat16()
        ckpts = CheckpointCollection(paths, module=network)
        coef = [0.25, 0.25, 0.5]
        recipe = Recipe.record("x", ckpts, coef, layers=dict.fromkeys(ckpts.layout, 0))
    first = recipe.ingredients[0]
    added = np.full(1000, coef[0] / 1000) if case == "many" else np.array([1e8])
    again = [dataclasses.replace(first, name=f"z{k}") for k in range(len(added))]
    coef = np.concatenate([[coef[0] - added.sum()], coef[1:], added])[None]
    recipe = dataclasses.replace(recipe, ingredients=(*recipe.ingredients, *again), coef=coef)
    good = recipe.cook(ckpts)
    assert recipe.verify(good, ckpts).ok
    name = "1.weight"
    eps = torch.finfo(good[name].dtype).eps
    sizes = sum(w[name].float().abs() for w in ckpts.values())
    findings = recipe.verify(
        {**good, name: good[name] + 32 * eps * sizes.to(good[name].dtype)}, ckpts
    )
    assert findings.differing == {name: "has other values"}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("n_large", [1, 6])
@pytest.mark.parametrize("case", ["factors", "adapters"])
def test_an_adapter_can_not_choose_how_much_is_rounding(tmp_path, case, n_large, axis):
    """Large factors of a small product, or two products that cancel out."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8))
    right = torch.randn(1, 8).repeat(2, 1)
    for k in range(2):
        left = torch.full((8, 2), 1e9)
        left[:, 1] *= -1 if case == "factors" else 1
        left *= -1 if k and case == "adapters" else 1
        left[:n_large, 0] *= 2 - k  # these rows of the soup are large, as of unused tokens
        b, a = (right.T, left.T) if axis else (left, right)
        factors = {"lora_B.weight": b.contiguous(), "lora_A.weight": a.contiguous()}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
        (tmp_path / f"a{k}").mkdir()
        save_file(
            {f"base_model.model.0.{name}": value for name, value in factors.items()},
            tmp_path / f"a{k}" / "adapter_model.safetensors",
        )
        (tmp_path / f"a{k}" / "adapter_config.json").write_text(json.dumps(config))
    ckpts = CheckpointCollection([tmp_path / "a0", tmp_path / "a1"], module=base)
    layers = dict.fromkeys(ckpts.layout, 0)
    recipe = Recipe.record("average", ckpts, np.array([0.5, 0.5]), layers=layers)
    good = recipe.cook(ckpts)
    assert good["0.weight"].select(axis, 0).abs().max() > 1e7
    assert recipe.verify(good, ckpts).ok
    other = good["0.weight"].clone()
    other.select(axis, 7).add_(1e-3)
    findings = recipe.verify({**good, "0.weight": other}, ckpts)
    assert findings.differing == {"0.weight": "has other values"}


def test_large_factors_beside_a_whole_model_are_no_rounding_of_its_dtype(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    left, right = torch.randn(64, 2).repeat(1, 2), torch.randn(2, 64)
    factors = {"lora_B.weight": left, "lora_A.weight": torch.cat([4096 * right, -4096 * right])}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["0"]}
    (tmp_path / "a").mkdir()
    save_file(
        {f"base_model.model.0.{name}": value for name, value in factors.items()},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    save_file(base.state_dict(), tmp_path / "whole.safetensors")
    ckpts = CheckpointCollection([tmp_path / "a", tmp_path / "whole.safetensors"], module=base)
    recipe = Recipe.record("x", ckpts, [0.5, 0.5], layers=dict.fromkeys(ckpts.layout, 0))
    good = recipe.cook(ckpts)
    assert recipe.verify(good, ckpts).ok
    findings = recipe.verify({**good, "0.weight": good["0.weight"] * 1.1}, ckpts)
    assert findings.differing == {"0.weight": "has other values"}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 24])
def test_products_that_are_all_rounded_otherwise_are_verified(
    tmp_path, monkeypatch, n, dtype, whole
):
    """More than another processor does: there, a few products in a billion are."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    for k in range(n):
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["0"]))
        nn.init.normal_(model.get_parameter("base_model.model.0.lora_B.default.weight"), std=0.02)
        model.save_pretrained(str(tmp_path / f"a{k:02d}"))
    paths = sorted(tmp_path.iterdir())
    if whole:
        save_file(base.state_dict(), tmp_path / "whole.safetensors")
        paths.append(tmp_path / "whole.safetensors")
    ckpts = CheckpointCollection(paths, module=base)
    assert bool(ckpts.on_one_base()) is not whole
    coef = np.random.default_rng(0).normal(size=len(paths))
    coef += (1 - coef.sum()) / len(coef)
    recipe = Recipe.record("x", ckpts, coef, layers=dict.fromkeys(ckpts.layout, 0))
    good = recipe.cook(ckpts)

    def add_to(self, sums, c=1.0):
        product = (self.left.double() @ self.right.double()).to(sums.dtype)
        up = torch.rand(product.shape) < 0.5
        product = product.nextafter(torch.where(up, torch.inf, -torch.inf))
        sums += product.view(sums.shape) * c

    with monkeypatch.context() as patched:
        patched.setattr("sksoup.checkpoints.low_rank.Factors.add_to", add_to)
        moved = recipe.cook(ckpts)
    assert dtype == torch.bfloat16 or not torch.equal(moved["0.weight"], good["0.weight"])
    assert recipe.verify(moved, ckpts).ok


@pytest.mark.parametrize("n_layers", range(40, 60, 2))
def test_integers_are_rebuilt_from_the_same_checkpoint_in_a_tie(n_layers):
    """In coefficients that rise with the depth for one, and fall for the other."""
    rises = 0.2 + 0.6 * np.linspace(0, 1, n_layers)
    coef = np.stack([rises, 1 - rises], axis=1)
    states = [
        {f"{i}.weight": torch.full((1,), float(k)) for i in range(n_layers)}
        | {"batches": torch.tensor(k)}
        for k in range(2)
    ]
    checkpoints = CheckpointCollection(states)
    layers = {f"{i}.weight": i for i in range(n_layers)} | {"batches": 0}
    recipe = Recipe.record("ramp", checkpoints, coef, layers=layers)
    assert recipe.verify(mix(checkpoints, coef, layers=layers), checkpoints).ok
