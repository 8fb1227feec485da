"""Files of every format give back their tensors, and errors that name them."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import read, sources

from ..zoo import make_states
from .files import STATE, read_all, write_file


@pytest.mark.parametrize(("suffix", "legacy"), [(".safetensors", 0), (".pt", 0), (".pth", 1)])
def test_every_format_gives_back_the_same_tensors(tmp_path, suffix, legacy):
    states = make_states(2, seed=0)
    paths = [tmp_path / f"{k}{suffix}" for k in range(2)]
    for path, state in zip(paths, states, strict=True):
        write_file(path, state, bool(legacy))
    collection = CheckpointCollection(paths)
    for name, state in zip(collection, states, strict=True):
        loaded = collection[name]
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_an_unknown_dtype_is_named(tmp_path, monkeypatch):
    save_file({"w": torch.ones(1)}, tmp_path / "t.safetensors")
    monkeypatch.delitem(read.SAFETENSORS_DTYPES, "F32")
    with pytest.raises(CheckpointError, match="'w' has dtype F32"):
        sources.open_checkpoint(tmp_path / "t.safetensors")


def test_a_missing_file():
    with pytest.raises(CheckpointError, match=r"no/such\.pt' can't be opened"):
        CheckpointCollection(["no/such.pt"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("size", [0, 3, 200, -10])
def test_a_file_that_is_empty_or_cut_off(tmp_path, suffix, size):
    path = tmp_path / f"cut{suffix}"
    write_file(path, make_states(1, seed=0)[0])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cut\.(safetensors|pt)'"):
        CheckpointCollection([path])


@pytest.mark.parametrize("size", [3, 200, -10])
def test_a_legacy_file_that_is_cut_off(tmp_path, size):
    path = tmp_path / "cut.pt"
    write_file(path, make_states(1, seed=0)[0], legacy=True)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cut\.pt'"):
        CheckpointCollection([path])


def test_a_file_system_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "ft0.safetensors"
    save_file({"w": torch.ones(2)}, path)
    file = sources.open_checkpoint(path)

    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(read, "safe_open", broken)
    with pytest.raises(CheckpointError, match=r"ft0.*Input/output error"), file.open() as get:
        get("w")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("fault", ["rewritten", "replaced", "deleted"])
def test_a_file_that_changes_after_opening_is_an_error(tmp_path, suffix, fault):
    path = tmp_path / f"ft{suffix}"
    first, second = make_states(2, seed=0)
    write_file(path, first)
    collection = CheckpointCollection([path])
    if fault == "deleted":
        path.unlink()
    elif fault == "rewritten":
        write_file(path, second)
        os.utime(path, ns=(1, 1))
    else:
        write_file(tmp_path / f"new{suffix}", second)
        (tmp_path / f"new{suffix}").replace(path)
    with pytest.raises(CheckpointError, match=r"changed on disk|can't be opened"):
        collection["ft"]


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "ft.safetensors"
    write_file(path, make_states(1, seed=0)[0])
    collection = CheckpointCollection([path])

    def read_while_it_changes():
        with collection.open("ft") as read:
            read("head.bias")
            os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed on disk"):
        read_while_it_changes()


def test_a_file_cut_off_under_its_map_is_found_when_it_is_opened_again(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(make_states(1, seed=0)[0], path)
    collection = CheckpointCollection([path])
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="changed on disk"):
        collection["a"]


def test_errors_of_the_reader_of_tensors_stay_what_they_are(tmp_path):
    path = tmp_path / "ft.safetensors"
    write_file(path, make_states(1, seed=0)[0])
    with pytest.raises(ZeroDivisionError), CheckpointCollection([path]).open("ft"):
        raise ZeroDivisionError


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
    return write_file(folder / "t.pt", content, legacy=kind == "legacy")


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
