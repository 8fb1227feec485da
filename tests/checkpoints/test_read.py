"""Files of every format give back their tensors, and errors that name them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import read, sources
from sksoup.checkpoints.protocol import same_bits

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


VALUES = {
    dtype: torch.arange(1, 41).to(dtype)
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.uint16,
        torch.bool,
    )
} | {torch.complex64: torch.complex(torch.arange(1.0, 41), -torch.arange(40.0))}

NOT_LEGACY = (torch.float8_e4m3fn, torch.uint16)  # torch.save can't


@st.composite
def views(draw, storages):
    """A tensor that is a view of one of the storages, in any way that torch.save stores."""
    values = draw(st.sampled_from(storages))
    size = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    stride = tuple(draw(st.integers(0, 4)) for _ in size)
    made = values.as_strided(size, stride, draw(st.integers(0, 8)))
    return made.conj() if values.is_complex() and draw(st.booleans()) else made


@given(data=st.data(), legacy=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_views_of_a_pt_file_are_those_of_torch(tmp_path, data, legacy):
    """Any views of a few storages; several names of one storage are read as one memory."""
    known = [dtype for dtype in VALUES if not (legacy and dtype in NOT_LEGACY)]
    dtypes = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
    storages = [VALUES[dtype].clone() for dtype in dtypes]
    state = {f"w{k}": data.draw(views(storages)) for k in range(data.draw(st.integers(1, 6)))}
    if state["w0"].dtype in (torch.float64, torch.float32) and data.draw(st.booleans()):
        state["w0"] = torch._neg_view(state["w0"])  # such copies are limited
    path = write_file(tmp_path / "a.pt", state, legacy)
    expected = torch.load(path, weights_only=True)
    weights = sources.open_checkpoint(path)
    order = data.draw(st.permutations(list(state)))
    with weights.open() as read_tensor:
        found = {name: read_tensor(name) for name in order}
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert found[name].stride() == value.stride() or value.is_neg()
            assert same_bits(found[name], value.resolve_neg())
        stored = [name for name, value in expected.items() if value.numel() and not value.is_neg()]
        for a in stored:
            for b in stored:
                both = (expected[n].untyped_storage().data_ptr() for n in (a, b))
                apart = found[a].data_ptr() - found[b].data_ptr()
                if len(set(both)) == 1:
                    assert apart == expected[a].data_ptr() - expected[b].data_ptr()


def test_of_a_legacy_file_only_what_is_needed_is_copied(tmp_path, monkeypatch):
    state = {"large": torch.zeros(1000), "small": (small := torch.ones(3)), "tied": small[:2]}
    weights = sources.open_checkpoint(write_file(tmp_path / "a.pt", state, legacy=True))
    copied, original = [], torch.UntypedStorage.clone
    monkeypatch.setattr(
        torch.UntypedStorage, "clone", lambda part: copied.append(len(part)) or original(part)
    )
    with weights.open() as read_tensor:
        assert [read_tensor(name).tolist() for name in ("small", "tied")] == [[1, 1, 1], [1, 1]]
    assert copied == [3 * 4]


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


def test_parts_of_ranks_are_no_checkpoints(tmp_path):
    """As save_pretrained(distributed_checkpoint=True) writes them."""
    for k in (1, 2):
        path = tmp_path / f"shard-0000{k}-model-00001-of-00001.safetensors"
        save_file({"w": torch.ones(2)}, path, metadata={"DCP_SHARDING_INFO": "{}"})
        if k == 1:
            assert len(CheckpointCollection.from_path(tmp_path)) == 1
    for number in ("00010", "12345"):
        other = tmp_path / f"shard-{number}-model-00001-of-00001.safetensors"
        shutil.copy(path, other)
    for part in tmp_path.iterdir():
        with pytest.raises(CheckpointError, match="is one rank's part of a model"):
            CheckpointCollection([part])
    shutil.copy(path, tmp_path.parent / "other.safetensors")
    assert len(CheckpointCollection([tmp_path.parent / "other.safetensors"])) == 1


@pytest.mark.parametrize("kind", ["file", "link", "hard link", "folder", "missing", "long", "deep"])
def test_the_real_path_is_that_of_python(tmp_path, kind):
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "deep":
        path = path.joinpath(*["x" * 200] * 30)
    elif kind != "missing":
        path.write_text("x")
    if kind == "link":
        (tmp_path / "to").symlink_to("a")
        (tmp_path / "c").symlink_to("to/../a/b")
        path = tmp_path / "c"
    elif kind == "hard link":
        os.link(path, tmp_path / "c (deleted)")
        path = tmp_path / "c (deleted)"
    elif kind == "long":
        path = tmp_path / ("y" * 300)
    assert read.real_path(path) == os.path.realpath(path)


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="elsewhere Python resolves the path")
def test_a_path_that_is_longer_than_the_system_allows_is_refused(tmp_path):
    """Python would look at each folder of each link again."""
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(20):
            os.mkdir("x" * 250)
            os.chdir("x" * 250)
        os.close(os.open("w.safetensors", os.O_CREAT))
        with pytest.raises(CheckpointError, match="its real path is too long"):
            read.real_path("w.safetensors")
    finally:
        os.chdir(before)
        shutil.rmtree(tmp_path / ("x" * 250))


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
