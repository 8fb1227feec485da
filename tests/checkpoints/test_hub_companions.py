"""Folders of sentence-transformers, which hold further modules beside the network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError, Recipe, UniformSoup, mix
from sksoup.__main__ import main
from sksoup.checkpoints import beside, hub_companions, modules, sweeps
from sksoup.checkpoints.hub_companions import copy_companions
from sksoup.cli import output

from ..zoo import around

transformers = pytest.importorskip("transformers")

SENTENCE = "sentence_transformers.models."
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{SENTENCE}Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{SENTENCE}Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{SENTENCE}Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": f"{SENTENCE}Normalize"},
]
LISTING = [
    "1_Pooling", "1_Pooling/config.json", "2_Dense", "2_Dense/config.json",
    "2_Dense/model.safetensors", "3_Normalize", "config.json", "model.safetensors",
    "modules.json", "sentence_bert_config.json",
]  # fmt: skip


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def runs(tmp_path):
    """Three folders as sentence-transformers saves them, with weights beside the network's."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    root = tmp_path / "runs"
    for k, model in enumerate(around(transformers.BertModel(config), 3)):
        folder = root / f"ft{k}"
        model.save_pretrained(folder)
        (folder / "modules.json").write_text(json.dumps(MODULES))
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
        for module in MODULES[1:]:
            (folder / module["path"]).mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
        (folder / "2_Dense" / "config.json").write_text("{}")
        (folder / "2_Dense" / "model.safetensors").write_bytes(b"the same in all")
        (folder / "notes").mkdir()
        (folder / "notes" / "config.json").write_text("{}")  # no module
    return root


def fit(runs):
    paths = [runs / f"ft{k}" for k in range(3)]
    return UniformSoup(forward=lambda module, X: module(**X).pooler_output).fit(
        CheckpointCollection(paths), {"input_ids": np.arange(8).reshape(2, 4)}, [0, 1]
    )


def test_the_modules_of_a_folder_are_no_checkpoints_in_it(runs):
    for module in runs.glob("*/2_Dense/model.safetensors"):
        save_file({"linear.weight": torch.ones(2, 2)}, module)
    assert CheckpointCollection.from_path(runs).names == ("ft0", "ft1", "ft2")
    assert CheckpointCollection.from_path(runs / "ft0").names == ("ft0",)
    (runs / "ft0" / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"ft0' is a checkpoint and holds 1 more, .*2_Dense"):
        CheckpointCollection.from_path(runs)


def test_the_modules_of_a_folder_are_listed_once(runs, monkeypatch):
    """Not once per folder in it, nor once per checkpoint that shares its config."""
    listed, original = [], modules.module_folders
    for user in (sweeps, beside):
        monkeypatch.setattr(
            user, "module_folders", lambda folder: listed.append(folder) or original(folder)
        )
    for k in range(5):
        shutil.copytree(runs / "ft1", runs / "ft0" / f"more{k}")
    with pytest.raises(CheckpointError, match="is a checkpoint and holds 5 more"):
        CheckpointCollection.from_path(runs / "ft0")
    assert listed == [runs / "ft0"]
    files = [shutil.copy(path, runs / f"{path.parent.name}.safetensors")
             for path in sorted(runs.glob("ft?/model.safetensors"))]  # fmt: skip
    shutil.copy(runs / "ft0" / "config.json", runs)
    ckpts = CheckpointCollection(files)
    assert hub_companions.model_folders(ckpts, ckpts.names) == [runs]


def test_the_encoders_of_one_model_are_no_checkpoints_of_one_network(runs):
    """As a Router of sentence-transformers has one for queries and one for documents."""
    routes = {"query_0": [], "document_0": []}
    for folder in runs.iterdir():
        for route in routes:
            (folder / route).mkdir()
            shutil.copy(folder / "config.json", folder / route)
            shutil.copy(folder / "model.safetensors", folder / route)
        (folder / "model.safetensors").unlink()
        (folder / "modules.json").write_text(json.dumps(MODULES[:1]))
        (folder / "router_config.json").write_text(json.dumps({"types": routes}))
    match = r"ft0' is a model of sentence-transformers with weights in 2 modules, .*'document_0'"
    for path in (runs, runs / "ft0", runs / "*"):
        with pytest.raises(CheckpointError, match=match):
            CheckpointCollection.from_path(path)
    assert len(CheckpointCollection.from_path(runs / "*" / "document_0")) == 3


VOCABULARIES = ["vocab.txt", "bpe.codes", "source.spm", "prophetnet.tokenizer", "spiece.model"]


def test_the_files_of_a_soup_are_those_of_its_ingredients(runs, tmp_path):
    """Not those of other checkpoints: also the files of tokenizers that are not JSON."""
    for k in range(3):
        for name in VOCABULARIES:
            (runs / f"ft{k}" / name).write_text(f"of {min(k, 1)}")
    a, b, c = (str(runs / f"ft{k}") for k in range(3))
    soup, cooked, weighted = (str(tmp_path / name) for name in ("soup", "cooked", "weighted"))
    assert main(["average", b, c, "-o", soup]) == 0
    assert main(["cook", soup, a, b, c, "-o", cooked]) == 0
    assert main(["average", a, b, c, "--weights", "0", ".5", ".5", "-o", weighted]) == 0
    fit(runs).interpolate("ft1", 0.0).save_pretrained(tmp_path / "saved")
    fit(runs).save_pretrained(tmp_path / "all")
    for folder in (soup, cooked, weighted, tmp_path / "saved"):
        assert {Path(folder, name).read_text() for name in VOCABULARIES} == {"of 1"}
    assert {(tmp_path / "all" / name).read_text() for name in VOCABULARIES} == {"of 0"}


def test_a_folder_of_sentence_transformers_comes_out_whole(runs, tmp_path):
    fit(runs).save_pretrained(tmp_path / "soup")
    assert listing(tmp_path / "soup") == sorted([*LISTING, "README.md"])


def test_sentence_transformers_opens_it(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    from .test_hub import encoder_folder

    model = library.SentenceTransformer(str(encoder_folder()), device="cpu")
    model.save_pretrained(str(tmp_path / "ft"))
    soup = UniformSoup(forward=lambda module, X: module(**X).pooler_output).fit(
        CheckpointCollection([tmp_path / "ft"]), {"input_ids": np.arange(8).reshape(2, 4)}, [0, 1]
    )
    soup.save_pretrained(tmp_path / "soup")
    assert listing(tmp_path / "soup") == listing(tmp_path / "ft")
    opened = library.SentenceTransformer(str(tmp_path / "soup"), device="cpu")
    text = ["a sentence about soups"]
    np.testing.assert_array_equal(opened.encode(text), model.encode(text))


def test_weights_that_are_not_mixed_have_to_be_the_same(runs, tmp_path):
    soup = fit(runs)
    for change in (b"others in this", b"the same in aLL"):
        (runs / "ft1" / "2_Dense" / "model.safetensors").write_bytes(change)
        with pytest.raises(CheckpointError, match=r"2_Dense.* its weights are not mixed, but tho"):
            soup.save_pretrained(tmp_path / "soup")
    shutil.rmtree(runs / "ft1" / "2_Dense")
    with pytest.raises(CheckpointError, match="its weights are not mixed"):
        soup.save_pretrained(tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", r"modules\.json' can't be read: expected a list of modules"),
        ("3", "can't be read: expected a list of modules"),
        ('["1_Pooling"]', "can't be read: expected a list of modules"),
        ('[{"name": "0"}]', r"can't be read: .*KeyError: 'path'"),
        ('[{"path": 3}]', "can't be read: .* not int"),
        ("[" * 100_000, "can't be read"),
        ('[{"path": "../ft1"}]', r"lists the module '\.\./ft1', expected a folder next to it"),
        ('[{"path": "/etc"}]', "lists the module '/etc', expected a folder next to it"),
        ('[{"path": "README.md"}]', r"lists the module 'README\.md', .* not named as a file"),
        (" " * (1 << 21), "larger than 1,048,576 bytes"),
        (json.dumps([{"path": "m" * 5000}]), r"modules\.json' lists a module .*name too long"),
        (json.dumps([{"path": "m"}] * 101), r"there are 101 modules, expected at most 100"),
    ],
)
def test_a_listing_that_can_not_be_read_is_named(content, match, runs, tmp_path):
    (runs / "ft0" / "modules.json").write_text(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=match):
        copy_companions(runs / "ft0", tmp_path / "out")
    assert not listing(tmp_path / "out")


def test_links_in_a_module_stay_in_the_folder(runs, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.json").write_text("secret")
    (tmp_path / "out").mkdir()
    inner = runs / "ft0" / "1_Pooling" / "config.json"
    inner.unlink()
    inner.symlink_to(secret / "key.json")
    with pytest.raises(
        CheckpointError, match=r"1_Pooling/config\.json' can't be copied: it is a l"
    ):
        copy_companions(runs / "ft0", tmp_path / "out")
    inner.unlink()
    inner.symlink_to("../1_Pooling")  # to itself, and so on for ever
    (runs / "ft0" / "1_Pooling" / "more").symlink_to(secret)
    copy_companions(runs / "ft0", tmp_path / "out")
    assert "1_Pooling/more" not in listing(tmp_path / "out")
    shutil.rmtree(runs / "ft0" / "1_Pooling")
    (runs / "ft0" / "1_Pooling").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"1_Pooling/key\.json' can't be copied: it is a l"):
        copy_companions(runs / "ft0", tmp_path / "out")


def test_a_module_that_is_spelled_in_many_ways_is_copied_once(tmp_path):
    source = tmp_path / "source"
    (source / "m").mkdir(parents=True)
    (source / "m" / "config.json").write_text("{}")
    names = ["", "m", "m/", "m/.", "m//.", "./m"]
    (source / "modules.json").write_text(json.dumps([{"path": name} for name in names]))
    with patch.object(hub_companions, "module_files", wraps=modules.module_files) as walked:
        copy_companions(source, tmp_path / "target")
    assert walked.call_count == 1
    assert (tmp_path / "target" / "m" / "config.json").is_file()


@pytest.mark.parametrize("target", [".", "..", "../m", "/"])
def test_a_module_that_is_another_folder_of_the_model_is_refused(tmp_path, target):
    """By two links in it a folder has many names: each would be a copy, and read once more."""
    source = tmp_path / "source"
    (source / "m").mkdir(parents=True)
    (source / "m" / "link").symlink_to(target if target == "/" else f"../{target}")
    if target == "../m":
        (source / "m" / "link").unlink()
        (source / "m" / "link").symlink_to(".")
    (source / "modules.json").write_text(json.dumps([{"path": "m"}, {"path": "m/link"}]))
    with pytest.raises(CheckpointError, match=r"m/link' can't be a module: it is a link to"):
        copy_companions(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_routes_in_routes_are_bounded(tmp_path):
    source = tmp_path / "source"
    (source / "q").mkdir(parents=True)
    names = [f"m{k}" for k in range(60)]
    for folder, listed in ((source, ["q", *names]), (source / "q", names)):
        for name in names:
            (folder / name).mkdir()
        (folder / "router_config.json").write_text(json.dumps({"types": dict.fromkeys(listed)}))
    with pytest.raises(CheckpointError, match=r"there are 101 modules, expected at most 100"):
        copy_companions(source, tmp_path / "target")


def test_a_router_comes_out_whole(tmp_path):
    source = tmp_path / "source"
    (source / "q" / "inner").mkdir(parents=True)
    (source / "config.json").write_text("{")  # other programs can't read it either
    (source / "router_config.json").write_text(
        '{"types": {"": "T", "q": "Dense", "q/inner": "Dense"}}'
    )
    for folder in (source / "q", source / "q" / "inner"):
        (folder / "config.json").write_text("{}")
    (tmp_path / "target").mkdir()
    copy_companions(source, tmp_path / "target")
    assert listing(tmp_path / "target") == listing(source)


@pytest.mark.parametrize(("given", "stored"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_transformers_loads_a_soup_in_the_dtype_that_was_asked_for(tmp_path, given, stored):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    for k, model in enumerate(around(transformers.BertModel(config), 2)):
        model.to(getattr(torch, stored)).save_pretrained(tmp_path / "runs" / f"ft{k}")
    out = tmp_path / "soup"
    assert main(["average", str(tmp_path / "runs"), "-o", str(out), "--dtype", given]) == 0
    found = transformers.BertModel.from_pretrained(out)
    assert found.dtype == getattr(torch, given)
    assert json.loads((out / "config.json").read_text())["dtype"] == given
    expected = CheckpointCollection.from_path(tmp_path / "runs")
    mean = mix(expected, [0.5, 0.5], dtype=found.dtype)
    for name, value in found.state_dict().items():
        assert torch.equal(value, mean[name])


@pytest.mark.parametrize(
    "content",
    ["[]", "no JSON", "{}", '{"dtype": "float16"}',
     '{"model_type": "x", "text_config": {"dtype": "float16"}}'],
)  # fmt: skip
def test_a_config_without_a_dtype_of_transformers_is_left_as_it_is(tmp_path, content):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    hub_companions.record_dtype(tmp_path)
    changed = (tmp_path / "config.json").read_text()
    if "text_config" in content:
        assert json.loads(changed) == {"model_type": "x", "text_config": {"dtype": "float32"}}
    else:
        assert changed == content


@pytest.mark.parametrize("way", ["save_pretrained", "average"])
def test_runs_of_several_dtypes(tmp_path, way):
    """The soup has the wider one, the config that is copied the narrower one."""
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    models = around(transformers.BertForSequenceClassification(config), 2)
    for model, dtype in zip(models, (torch.bfloat16, torch.float32), strict=True):
        model.to(dtype).save_pretrained(tmp_path / "runs" / str(dtype))
    ckpts = CheckpointCollection.from_path(tmp_path / "runs")
    if way == "average":
        assert main(["average", str(tmp_path / "runs"), "-o", str(tmp_path / "soup")]) == 0
    else:
        soup = UniformSoup().fit(ckpts, {"input_ids": torch.ones(2, 4, dtype=torch.long)}, [0, 1])
        soup.save_pretrained(tmp_path / "soup")
    found = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "soup")
    mean = mix(ckpts, [0.5, 0.5])
    assert found.dtype == torch.float32
    for name, value in found.state_dict().items():
        assert torch.equal(value, mean[name])


def test_average_refuses_what_it_can_not_copy_before_it_reads_weights(runs, tmp_path, monkeypatch):
    (tmp_path / "private.json").write_text("token")
    (runs / "ft0" / "notes.json").symlink_to(tmp_path / "private.json")
    monkeypatch.setattr(Recipe, "cook", lambda *_: pytest.fail("weights were read"))
    given = [str(runs / f"ft{k}") for k in range(3)]
    assert main(["average", *given, "-o", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["link", "weights"])
def test_a_fit_is_refused_where_its_soup_could_not_be_saved(runs, tmp_path, what):
    """Unless two of the folders could give it: which are in the soup is not known before."""
    for k in range(3):
        if what == "link":
            (runs / f"ft{k}" / "notes.json").symlink_to(Path(__file__))
        else:
            (runs / f"ft{k}" / "2_Dense" / "model.safetensors").write_bytes(bytes([k]))
    ckpts = CheckpointCollection.from_path(runs)
    match = {"link": "outside its folder", "weights": "its weights are not mixed"}[what]
    with pytest.raises(CheckpointError, match=match):
        output.check_companions(tmp_path / "out", ckpts, None)
    output.check_companions(tmp_path / "out.safetensors", ckpts, None)
    for k in range(2):
        (runs / f"ft{k}" / "notes.json").unlink(missing_ok=True)
        (runs / f"ft{k}" / "2_Dense" / "model.safetensors").write_bytes(b"the same")
    output.check_companions(tmp_path / "out", ckpts, None)


@pytest.mark.parametrize("name", ["weights", "soup"])
def test_a_module_may_have_any_name(runs, tmp_path, name):
    for k in range(3):
        (runs / f"ft{k}" / "2_Dense").rename(runs / f"ft{k}" / name)
        (runs / f"ft{k}" / name / "model.safetensors").unlink()
        listed = [MODULES[0], {"idx": 1, "name": "1", "path": name, "type": f"{SENTENCE}Pooling"}]
        (runs / f"ft{k}" / "modules.json").write_text(json.dumps(listed))
    given = [str(runs / f"ft{k}") for k in range(3)]
    assert main(["average", *given, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / name / "config.json").is_file()
    assert main(["verify", str(tmp_path / "out"), *given]) == 0


def test_a_fit_is_refused_where_its_tokenizer_could_not_be_copied(runs, tmp_path):
    (tmp_path / "store.txt").write_text("[UNK]")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").symlink_to(tmp_path / "store.txt")
    ckpts = CheckpointCollection.from_path(runs)
    with pytest.raises(CheckpointError, match=r"vocab\.txt' can't be copied: it is a link"):
        output.check_companions(tmp_path / "out", ckpts, tmp_path / "tokenizer")
    output.check_companions(tmp_path / "out.safetensors", ckpts, tmp_path / "tokenizer")


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="elsewhere Python resolves the path")
def test_links_to_companions_are_resolved_at_once(tmp_path):
    source = tmp_path / "model"
    inner = source.joinpath("x", *["a"] * 200)
    inner.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "x" / "link").symlink_to(inner.joinpath(*[".."] * 200, "data"))
    (source / "x" / "data").write_text("{}")
    for k in range(5):
        (source / f"t{k}.json").symlink_to("x/link")
    (tmp_path / "copy").mkdir()
    with patch.object(os, "lstat", wraps=os.lstat) as looks:
        copy_companions(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "t4.json").read_text() == "{}"
    assert looks.call_count < 100
