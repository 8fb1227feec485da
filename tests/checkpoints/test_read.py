from __future__ import annotations

import argparse
import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sksoup import CheckpointError
from sksoup.checkpoints import folders, protocol, read, sources, torch_files, write
from sksoup.mixing import mix


def test_write_replaces_a_file_or_leaves_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "soup.safetensors"
    write.write_safetensors(path, {"w": torch.ones(2)}, {"note": "old"})

    def disk_full(tensors, filename, metadata):
        filename.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left") as caught:
        write.write_safetensors(path, {"w": torch.zeros(2)})
    assert "soup.safetensors' was not written" in caught.value.__notes__[0]
    assert "Make room" in caught.value.__notes__[0]
    assert torch.equal(load_file(path)["w"], torch.ones(2))
    assert folders.read_metadata(path) == {"note": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["soup.safetensors"]
    monkeypatch.undo()
    write.write_safetensors(path, {"w": torch.zeros(2)})
    assert torch.equal(load_file(path)["w"], torch.zeros(2))


def test_writing_needs_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write.write_text(tmp_path / "no" / "recipe.json", "{}")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write.write_text(tmp_path, "{}")


def test_tied_and_strided_tensors_are_written_whole(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    write.write_safetensors(tmp_path / "t.safetensors", {"a": w, "tied": w, "turned": w.T})
    loaded = load_file(tmp_path / "t.safetensors")
    assert torch.equal(loaded["tied"], w)
    assert torch.equal(loaded["turned"], w.T)


def test_an_unknown_dtype_is_named(tmp_path, monkeypatch):
    save_file({"w": torch.ones(1)}, tmp_path / "t.safetensors")
    monkeypatch.delitem(read.SAFETENSORS_DTYPES, "F32")
    with pytest.raises(CheckpointError, match="'w' has dtype F32"):
        sources.open_checkpoint(tmp_path / "t.safetensors")


# ---------------------------------------------------------------------------- containers

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def save_torch(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def read_all(path, key=None):
    weights = sources.open_checkpoint(path, key)
    with weights.open() as read:
        return {name: read(name).clone() for name in weights.header}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "module", "ema", "x"])
def test_the_one_state_dict_of_a_container_is_taken(tmp_path, name, legacy):
    container = {name: STATE, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    path = save_torch(tmp_path / "run.ckpt", container, legacy)
    loaded = read_all(path)
    assert list(loaded) == ["a", "b"]
    assert torch.equal(loaded["a"], STATE["a"])


def test_several_state_dicts_need_a_key(tmp_path):
    other = {"a": STATE["a"] + 1, "b": STATE["b"]}
    path = save_torch(tmp_path / "run.pt", {"model": STATE, "ema": other, "step": 1})
    listed = r"run\.pt' holds several state dicts: 'model' \(2 tensors\), 'ema' \(2 tensors\)"
    with pytest.raises(CheckpointError, match=listed + r"\. Say which: key='model'"):
        sources.open_checkpoint(path)
    assert torch.equal(read_all(path, "ema")["a"], other["a"])
    with pytest.raises(CheckpointError, match=r"no state dict under key='nope': it offers 'model'"):
        sources.open_checkpoint(path, "nope")
    plain = save_torch(tmp_path / "plain.pt", STATE)
    with pytest.raises(CheckpointError, match="it is a plain state dict"):
        sources.open_checkpoint(plain, "ema")


class Odd:
    """Stands for a class that is not installed where the checkpoint is opened."""

    def __init__(self, note):
        self.note = note


def test_harmless_foreign_classes_become_inert(tmp_path, monkeypatch):
    container = {
        "state_dict": STATE,
        "args": argparse.Namespace(lr=0.1, odd=Odd("x")),
        "best": np.float64(0.5),
        "when": np.arange(3),
    }
    path = save_torch(tmp_path / "run.pt", container)
    monkeypatch.setattr(Odd, "__init__", None)  # would raise if it were called
    assert torch.equal(read_all(path)["a"], STATE["a"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function", [os.rmdir, shutil.rmtree, pathlib.Path.rmdir])
def test_a_container_with_a_payload_is_refused(tmp_path, legacy, function):
    canary = tmp_path / "canary"
    canary.mkdir()

    class Payload:
        def __reduce__(self):
            return function, (canary,)

    path = save_torch(tmp_path / "run.pt", {"state_dict": STATE, "hooks": [Payload()]}, legacy)
    with pytest.raises(CheckpointError, match=r"run\.pt' can't be read: it holds more than"):
        sources.open_checkpoint(path)
    assert canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "os.system",
        "numpy.testing.Popen",
        "torch.Jit",
        "subprocess.Popen",
        "shutil.rmtree",
        "runpy.run_path",
    ],
)
def test_no_placeholder_runs_anything(name):
    """Even where a name is let through, what it stands for does nothing."""
    if torch_files._is_harmless(name):
        placeholder = torch_files._placeholder(name)
        assert placeholder("touch", shell=True).__class__.__module__ == torch_files.__name__
    else:
        assert name.split(".")[0] in torch_files._NEVER


# ------------------------------------------------------------------------------ shards


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
    assert folders.list_weights(index.parent) == [index.parent]
    other = index.rename(index.with_name(f"other.{index.name}"))
    assert folders.list_weights(index.parent) == [other]  # its shards once, by their index
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
    with pytest.raises(CheckpointError, match=r"does not fit its shards: '.*' lacks 'c'"):
        sources.open_checkpoint(index)


def test_a_peft_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(STATE, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds a PEFT adapter, expected whole weights"):
        sources.open_checkpoint(tmp_path)


# -------------------------------------------------------------------------------- fuzz


KINDS = ["safetensors", "zip", "legacy", "container", "index"]


def write_kind(folder, kind):
    """A small file of this kind."""
    if kind in ("safetensors", "index"):
        path = folder / "t.safetensors"
        save_file(STATE, path)
        if kind == "index":
            path = folder / "t.safetensors.index.json"
            path.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "t.safetensors")}))
        return path
    content = {"model": STATE, "n": 1} if kind == "container" else STATE
    return save_torch(folder / "t.pt", content, legacy=kind == "legacy")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_truncation_is_a_checkpoint_error_that_names_the_file(tmp_path, data, kind):
    path = write_kind(tmp_path, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        read_all(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_flip_is_a_checkpoint_error_or_a_well_formed_file(tmp_path, data, kind):
    path = write_kind(tmp_path, kind)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        loaded = read_all(path)
    except CheckpointError as error:
        said = str(error)
    else:
        said = path.name
        assert all(isinstance(value, torch.Tensor) for value in loaded.values())
    assert str(tmp_path) in said or path.name in said


# ------------------------------------------------------------------------------ writing


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64,
                                     torch.uint8, torch.bool]), min_size=6, max_size=6),
    shard_bytes=st.integers(1, 300),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_one_by_one_reads_back(tmp_path_factory, shapes, dtypes, shard_bytes):
    tensors = {
        f"t{i}": torch.rand(shape).mul(100).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    infos = {n: protocol.TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    folder = tmp_path_factory.mktemp("out") / "model"
    write.write_shards(
        folder, infos, lambda names: ((n, tensors[n]) for n in names), {"k": "v"}, shard_bytes
    )
    loaded = {}
    for path in folder.glob("*.safetensors"):
        loaded.update(load_file(path))  # the library's own reader checks the format
    assert all(mix.same_bits(loaded[name], tensors[name]) for name in tensors)
    assert loaded.keys() == tensors.keys()
    assert folders.read_metadata(folder) == {"format": "pt", "k": "v"}
    again = read_all(folder)
    assert all(mix.same_bits(again[name], tensors[name]) for name in tensors)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fails(names):
        yield names[0], STATE[names[0]]
        raise OSError(errno.ENOSPC, "No space left on device")

    infos = {n: protocol.TensorInfo(tuple(t.shape), t.dtype) for n, t in STATE.items()}
    with pytest.raises(OSError, match="No space left") as caught:
        write.write_shards(tmp_path / "model", infos, fails)
    assert "model' was not written" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        write.write_shards(tmp_path / "model", infos, fails)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write.write_shards(tmp_path / "no" / "model", infos, fails)
    swapped = {"a": STATE["a"], "b": STATE["b"]}  # wider numbers go first
    with pytest.raises(RuntimeError, match=r"'a' came where 'b' was to be written"):
        write.write_shards(tmp_path / "m", infos, lambda names: iter(swapped.items()))
    odd = {"c": protocol.TensorInfo((1,), torch.float8_e4m3fnuz)}
    with pytest.raises(CheckpointError, match=r"safetensors has no torch\.float8_e4m3fnuz"):
        write.write_shards(tmp_path / "m", odd, fails)


KILLED = """
import os, random, signal, sys, time, torch
from pathlib import Path
from safetensors.torch import load_file
from sksoup.checkpoints import write

path = Path(sys.argv[1])
torch.set_num_threads(1)
states = [{f"t{i}": torch.full((200_000,), float(k)) for i in range(10)} for k in range(2)]
write.write_safetensors(path, states[0])
writes = set()
for _ in range(40):
    child = os.fork()
    if not child:
        for k in range(10**6):
            write.write_safetensors(path, states[k % 2])
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (value,) = {float(v) for tensor in load_file(path).values() for v in tensor.unique()}
    assert value in (0, 1)
    writes.add(path.stat().st_mtime_ns)
assert len(writes) > 5
print("whole")
"""


def test_a_kill_while_saving_leaves_a_whole_file(tmp_path):
    """Forty processes that save over one file all the time, each killed at a random moment."""
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path / "soup.safetensors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.stdout == "whole\n", killed.stderr


def test_a_folder_that_can_not_be_written_to(tmp_path, monkeypatch):
    """As root nothing is read-only, so the system's refusal is put in."""

    def refuse(tensors, filename, metadata):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr(write, "save_file", refuse)
    with pytest.raises(SafetensorError, match="Permission denied") as caught:
        write.write_safetensors(tmp_path / "soup.safetensors", {"w": torch.zeros(2)})
    assert "folder that can be written to" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "ft0.safetensors"
    save_file({"w": torch.ones(2)}, path)
    file = sources.open_checkpoint(path)

    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(read, "safe_open", broken)
    with pytest.raises(CheckpointError, match=r"ft0.*Input/output error"), file.open() as get:
        get("w")


def test_a_state_dict_with_extra_state_is_no_container(tmp_path):
    state = {"fc.weight": torch.ones(2), "fc._extra_state": {"scale": torch.ones(1)}}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"not a plain state dict: 'fc._extra_state' is a d"):
        sources.open_checkpoint(tmp_path / "m.pt")


def test_containers_are_read_by_many_threads_and_no_warning_is_lost(tmp_path):
    paths = [tmp_path / f"{k}.pt" for k in range(2)]
    for path in paths:
        torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, path)
    before, errors = list(warnings.filters), []

    def read(path):
        try:
            for _ in range(60):
                with sources.open_checkpoint(path).open() as one:
                    one("w")
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(path,)) for path in paths * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert warnings.filters == before


class Settings(dict):
    """As configurations often are."""


def test_objects_that_can_not_be_made_inert_are_told_from_damage(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "config": Settings(lr=1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"objects beside tensors .* Save the state dict al"):
        sources.open_checkpoint(tmp_path / "c.pt")


def test_a_folder_is_written_where_a_link_points(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    with write.new_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("whole")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "scratch" / "a").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch"]


def test_the_unfinished_folder_of_another_is_left_alone(tmp_path):
    other = tmp_path / f".out.{os.getpid()}.tmp"  # in a container all have the same number
    other.mkdir()
    with write.new_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("whole")
    assert (tmp_path / "out" / "a").exists()
    assert other.exists()


def test_numbers_beside_the_state_dict_of_a_container(tmp_path):
    """As training scripts keep the best accuracy and the state of their generator."""
    saved = {"state_dict": {"w": torch.ones(2)}, "epoch": 3, "best_acc1": torch.tensor(71.2),
             "rng_state": torch.get_rng_state()}  # fmt: skip
    torch.save(saved, tmp_path / "a.pt")
    assert list(sources.open_checkpoint(tmp_path / "a.pt").header) == ["w"]


def test_files_of_another_pickle_protocol_are_read_in_silence(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=3)
    code = (
        "import sys, pathlib, warnings; import torch, sklearn, skorch, safetensors, joblib;"
        "before = list(warnings.filters);"
        "import sksoup.checkpoints.sources as f; assert warnings.filters == before;"
        "print(list(f.open_checkpoint(pathlib.Path(sys.argv[1])).header))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.pt"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("['w']\n", "")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"Save it anew, without pickle_protocol="):
        sources.open_checkpoint(tmp_path / "b.pt")
