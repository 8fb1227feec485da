"""An index of shards is one checkpoint."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import sources
from sksoup.mixing.files import refuse_inputs
from sksoup.recipes.start import name_of_start

from .files import STATE, read_all


@pytest.fixture(params=["safetensors", "bin"])
def index(tmp_path, request):
    """Two shards and an index, as Hugging Face writes them."""
    suffix = request.param
    names = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for name, tensor in zip(names, STATE, strict=True):
        part = {tensor: STATE[tensor]}
        save_file(part, tmp_path / name) if suffix == "safetensors" else torch.save(
            part, tmp_path / name
        )
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    path = tmp_path / f"{stem}.index.json"
    path.write_text(json.dumps({"weight_map": dict(zip(STATE, names, strict=True))}))
    return path


def test_shards_are_one_checkpoint(index):
    for path in (index, index.parent):
        loaded = read_all(path)
        assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    assert sources.find_checkpoints(index.parent).paths == [index.parent]
    other = index.rename(index.with_name(f"other.{index.name}"))
    assert sources.find_checkpoints(index.parent).paths == [
        other
    ]  # its shards once, by their index
    index = other.rename(index)
    first = sources.open_checkpoint(index).sha256()
    shard = next(index.parent.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes())
    assert sources.open_checkpoint(index).sha256() == first


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "can't be read: JSONDecodeError"),
        ("{}", "can't be read: KeyError"),
        ("[]", "can't be read: TypeError"),
        ('{"weight_map": {}}', "has no weights in its 'weight_map'"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "expected the name of a file"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "expected the name of a file"),
        ('{"weight_map": {"a": 3}}', "expected the name of a file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors' can't be opened"),
    ],
)
def test_an_index_that_is_wrong(index, text, match):
    index.write_text(text)
    with pytest.raises(CheckpointError, match=match):
        sources.open_checkpoint(index)


def test_an_index_that_names_what_its_shards_lack(index):
    document = json.loads(index.read_text())
    document["weight_map"]["c"] = document["weight_map"]["a"]
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"does not match its shards: '.*' lacks 'c'"):
        sources.open_checkpoint(index)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_index_that_several_checkpoints_share(tmp_path, link):
    """The cache of Hugging Face keeps equal files once; the shards beside each link differ."""
    listed = {"a": "0.safetensors", "b": "1.safetensors"}
    (tmp_path / "blob").write_text(json.dumps({"weight_map": listed}))
    for k in range(3):
        run = tmp_path / "sweep" / f"r{k}"
        run.mkdir(parents=True)
        link(tmp_path / "blob", run / "ft.safetensors.index.json")
        for name, shard in listed.items():
            save_file({name: torch.full((2,), float(k))}, run / shard)
    pattern = str(tmp_path / "sweep" / "*" / "*.index.json")
    for given in (tmp_path / "sweep", pattern, sorted((tmp_path / "sweep").glob("*/*.index.json"))):
        found = CheckpointCollection.from_path(given)
        assert [found[name]["b"][0].item() for name in found] == [0, 1, 2]
    again = tmp_path / "sweep" / "r0" / "again.safetensors.index.json"
    again.symlink_to("ft.safetensors.index.json")  # the same checkpoint
    assert len(CheckpointCollection.from_path([pattern, tmp_path / "sweep"])) == 3
    with pytest.raises(FileExistsError, match="is one of the checkpoints to be mixed"):
        refuse_inputs(tmp_path / "sweep" / "r0" / "0.safetensors", found, found)
    start = tmp_path / "sweep" / "r2" / "ft.safetensors.index.json"
    assert name_of_start(found, start) == found.names[2]
