"""What users have becomes checkpoints with names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import sources

from ..zoo import make_states
from .files import write_file


@pytest.mark.parametrize("pattern", ["*.safetensors", "ft?.safetensors"])
def test_from_a_pattern(folder, pattern):
    found = CheckpointCollection.from_path(f"{folder}/{pattern}")
    assert len(found) == (11 if pattern.startswith("*") else 10)


def test_from_one_file(folder):
    assert CheckpointCollection.from_path(folder / "ft3.safetensors").names == ("ft3",)


def test_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="at least one"):
        CheckpointCollection([])
    with pytest.raises(CheckpointError, match="No checkpoints found"):
        CheckpointCollection.from_path(tmp_path)


def test_names_are_unique_across_folders(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        save_file(make_states(1, seed=0)[0], tmp_path / run / "last.safetensors")
    found = CheckpointCollection.from_path(f"{tmp_path}/*/last.safetensors")
    assert found.names == ("a/last", "b/last")


def test_the_same_stem_in_one_folder_still_gets_two_names(tmp_path):
    state = make_states(1, seed=0)[0]
    write_file(tmp_path / "a.pt", state)
    write_file(tmp_path / "a.safetensors", state)
    assert len(set(CheckpointCollection.from_path(tmp_path).names)) == 2


def test_the_same_file_twice_gets_two_names(tmp_path):
    save_file(make_states(1, seed=0)[0], tmp_path / "a.safetensors")
    save_file(make_states(1, seed=0)[0], tmp_path / "b.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    names = CheckpointCollection([a, b, a]).names
    assert names[0].endswith("a.safetensors#0")
    assert names[2].endswith("a.safetensors#2")
    assert names[1].endswith("b.safetensors")
    torch.save(make_states(1, seed=0)[0], tmp_path / "a.pt")
    assert CheckpointCollection.from_path(tmp_path).names == (
        "a.pt", "a.safetensors", "b.safetensors",
    )  # fmt: skip


def test_a_suffix_and_a_folder_that_are_none_of_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"suffix '\.txt'"):
        CheckpointCollection([tmp_path / "notes.txt"])
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="is a folder without weights"):
        CheckpointCollection([tmp_path / "folder.pt"])


def test_suffixes_in_capitals_and_of_the_imagenet_example_are_not_left_out(tmp_path):
    state = {"weight": torch.zeros(2)}
    for name in ("a.PT", "b.pt", "c.pth.tar", "d.Pth.Tar"):
        torch.save(state, tmp_path / name)
    save_file(state, tmp_path / "e.SAFETENSORS")
    save_file(state, tmp_path / "f.pth.tar")  # by its first bytes
    (tmp_path / "optimizer.PT").write_bytes(b"no weights")
    (tmp_path / "optimizer.pth.tar").write_bytes(b"no weights")
    (tmp_path / "data.tar").write_bytes(b"no weights")
    (tmp_path / "data.json.tar").write_bytes(b"no weights")
    assert CheckpointCollection.from_path(tmp_path).names == ("a", "b", "c", "d", "e", "f")
    assert len(CheckpointCollection.from_path(tmp_path / "*.tar")) == 2
    assert len(CheckpointCollection([tmp_path / "a.PT", tmp_path / "c.pth.tar"])) == 2
    with pytest.raises(CheckpointError, match=r"has the suffix '\.tar', expected"):
        CheckpointCollection([tmp_path / "data.tar"])


def names_one_by_one(paths):
    """`unique_names`, with one more folder after the other."""
    for depth in range(1, 9):
        for suffix in (False, True):
            names = [
                "/".join([*p.parent.parts[1:], p.name if suffix else p.stem][-depth:])
                for p in paths
            ]
            if len(set(names)) == len(names):
                return tuple(names)
    return tuple(f"{n}#{k}" if names.count(n) > 1 else n for k, n in enumerate(names))


PATHS = st.builds(
    lambda folders, name, suffix: Path("/no", *folders, name + suffix),
    st.lists(st.sampled_from("ab"), max_size=4),
    st.sampled_from("xy"),
    st.sampled_from([".pt", ".bin"]),
)


@given(st.lists(PATHS, min_size=1, max_size=8))
def test_names_have_as_few_folders_as_possible(paths):
    assert sources.unique_names(paths) == names_one_by_one(paths)


def test_the_names_of_deep_folders_are_looked_up_once(monkeypatch):
    """Not at every depth."""
    paths = [Path("/no", first, *"a" * 800, "w.pt") for first in "xy"]
    paths += [Path(f"/no/r{k}/w.pt") for k in range(100)]
    looked, named = [], sources._named
    monkeypatch.setattr(sources, "_named", lambda path: looked.append(path) or named(path))
    names = sources.unique_names(paths)
    assert len(looked) == len(paths) == len(set(names))
    assert names[0] == "x/" + "a/" * 800 + "w"
