from __future__ import annotations

import errno

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sksoup import CheckpointError
from sksoup import _formats as formats


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["safetensors", "zip", "legacy"]))
def test_any_truncation_is_a_checkpoint_error_that_names_the_file(tmp_path, data, kind):
    path = tmp_path / ("t.safetensors" if kind == "safetensors" else "t.pt")
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"t\.(safetensors|pt)'"):
        formats.open_weights(path)


def test_write_replaces_a_file_or_leaves_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "soup.safetensors"
    formats.write_safetensors(path, {"w": torch.ones(2)}, {"note": "old"})

    def disk_full(tensors, filename, metadata):
        filename.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        formats.write_safetensors(path, {"w": torch.zeros(2)})
    assert torch.equal(load_file(path)["w"], torch.ones(2))
    assert formats.read_metadata(path) == {"note": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["soup.safetensors"]
    monkeypatch.undo()
    formats.write_safetensors(path, {"w": torch.zeros(2)})
    assert torch.equal(load_file(path)["w"], torch.zeros(2))


def test_writing_needs_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        formats.write_text(tmp_path / "no" / "recipe.json", "{}")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        formats.write_text(tmp_path, "{}")


def test_tied_and_strided_tensors_are_written_whole(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    formats.write_safetensors(tmp_path / "t.safetensors", {"a": w, "tied": w, "turned": w.T})
    loaded = load_file(tmp_path / "t.safetensors")
    assert torch.equal(loaded["tied"], w)
    assert torch.equal(loaded["turned"], w.T)


def test_an_unknown_dtype_is_named(tmp_path, monkeypatch):
    save_file({"w": torch.ones(1)}, tmp_path / "t.safetensors")
    monkeypatch.delitem(formats._SAFETENSORS_DTYPES, "F32")
    with pytest.raises(CheckpointError, match="'w' has dtype F32"):
        formats.open_weights(tmp_path / "t.safetensors")
