"""Texts beside weights: regular files of bounded size, and nothing else is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sksoup import CheckpointError
from sksoup.checkpoints import texts
from sksoup.checkpoints.texts import read_text


def test_a_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "blob").write_text("süß", encoding="utf-8")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_text(tmp_path / "blob", 5) == "süß"  # 5 bytes
    assert read_text(tmp_path / "config.json", 100) == "süß"


def test_what_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole of a terabyte
    with pytest.raises(
        CheckpointError, match=r"config\.json' can't be used: it is larger than 4,0"
    ):
        read_text(path, 4_000)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder"])
def test_what_is_not_a_file_is_not_opened(kind, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    monkeypatch.setattr(texts.os, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read_text(path, 100)


def test_a_file_that_becomes_a_pipe_does_not_hang(tmp_path, monkeypatch):
    regular, pipe = tmp_path / "regular", tmp_path / "pipe"
    regular.write_text("{}")
    os.mkfifo(pipe)
    stat = os.stat
    with monkeypatch.context() as patch:
        patch.setattr(texts.os, "stat", lambda path: stat(regular))
        with pytest.raises(CheckpointError, match="pipe' can't be used"):
            read_text(pipe, 100)


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for path, match in (
        (tmp_path / "bytes", "can't be read: 'utf-8' codec"),
        (tmp_path / "absent", "can't be read: .*No such file"),
        (loop, "can't be read: .*symbolic links"),
        (Path("a\0b"), "can't be read: .*null byte"),
    ):
        with pytest.raises(CheckpointError, match=match) as caught:
            read_text(path, 100)
        assert caught.value.__cause__ is not None
