"""Paths without checkpoints: the error says what is there and what would open it."""

from __future__ import annotations

import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError

from .runs import STATE

from_path = CheckpointCollection.from_path


def said(path):
    with pytest.raises(CheckpointError, match="No checkpoints found at") as caught:
        from_path(path)
    return str(caught.value)


def test_the_nearest_name(tmp_path, monkeypatch):
    (tmp_path / "runs" / "ft1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert said("rnus") == (
        f"No checkpoints found at 'rnus': there is no 'rnus' in {str(tmp_path)!r} (from the folder "
        f"{str(tmp_path)!r}); a similar name there is 'runs'."
    )
    assert "no 'ft2' in" in said("runs/ft2/a.pt")
    assert "a similar name there is 'ft1'" in said("runs/ft2/*.pt")
    assert "it holds 'ft1'" in said(tmp_path / "runs" / "something")


def test_a_pattern_without_a_match(tmp_path):
    (tmp_path / "a.txt").touch()
    assert f"no name in {str(tmp_path)!r} matches '*.pt'; it holds 'a.txt'" in said(
        f"{tmp_path}/*.pt"
    )
    assert "it matches 'a.txt'; expected" in said(f"{tmp_path}/*.txt")


def test_what_a_folder_holds_and_the_pattern_that_opens_it(tmp_path):
    assert "it holds nothing; expected" in said(tmp_path)
    deep = tmp_path / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    for k in range(6):
        (tmp_path / f"n{k}.log").touch()
    assert "it holds 'a', 'n0.log', 'n1.log', 'n2.log', 'n3.log' and 2 more" in said(tmp_path)
    torch.save(STATE, deep / "ft0.pt")
    message = said(tmp_path)
    pattern = f"{tmp_path}/*/*/*/*/*.pt"
    assert f"the pattern {pattern!r} opens those in its subfolders" in message
    assert from_path(pattern).names == ("ft0",)
