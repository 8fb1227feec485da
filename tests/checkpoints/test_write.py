"""Files and folders of weights are written whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from sksoup import CheckpointError
from sksoup.checkpoints import folders, protocol, write
from sksoup.checkpoints.protocol import same_bits

from .files import STATE, read_all


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
    assert "Free some disk space" in caught.value.__notes__[0]
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
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    assert loaded.keys() == tensors.keys()
    assert folders.read_metadata(folder) == {"format": "pt", "k": "v"}
    again = read_all(folder)
    assert all(same_bits(again[name], tensors[name]) for name in tensors)


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
    with pytest.raises(RuntimeError, match=r"got the tensor 'a', expected 'b'"):
        write.write_shards(tmp_path / "m", infos, lambda names: iter(swapped.items()))
    odd = {"c": protocol.TensorInfo((1,), torch.float8_e4m3fnuz)}
    with pytest.raises(
        CheckpointError, match=r"safetensors does not support torch\.float8_e4m3fnuz"
    ):
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
    assert "a folder with write permission" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


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
