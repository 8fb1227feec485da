"""Patterns match what glob matches, also through links, but each folder on the way once."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from sksoup.checkpoints.patterns import matches_of


@pytest.fixture
def tree(tmp_path):
    for path in ("a/x/w.pt", "a/y/w.pt", "b/x/w.pt", "b/[odd]/w.pt", "b/.hidden/w.pt", "w.pt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "latest").symlink_to("a")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b" / "nowhere").symlink_to("missing")
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.pt", "*/*", "*/*/*", "*/x/*.pt", "*/x/w.pt", "*/", "*/*/", "[ab]/x", "?/[[]odd]/w.pt",
     "*/.*/*", "*/../*", "a/*/w.pt", "a/x/w.pt", "none*/w.pt", "*/missing", "*/nowhere"],
)  # fmt: skip
def test_the_matches_are_those_of_glob(tree, monkeypatch, pattern):
    monkeypatch.chdir(tree)
    for start in ("", f"{tree}{os.sep}"):
        found = [str(match) for match in matches_of(start + pattern)]
        expected = {os.path.normpath(match) for match in glob.glob(start + pattern)}
        assert {os.path.normpath(match) for match in found} <= expected
        assert {*map(os.path.realpath, found)} == {*map(os.path.realpath, expected)}
        assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "pattern", ["**/w.pt", "*/**/w.pt", "**/*/w.pt", "a/**", "*/*/**/*.pt", "**/x/**/*"]
)
def test_two_stars_match_what_pathlib_matches_but_what_is_hidden(tree, monkeypatch, pattern):
    monkeypatch.chdir(tree)
    for start in (Path(), tree):
        found = list(matches_of(str(start / pattern)))
        expected = [match for match in start.glob(pattern) if ".hidden" not in match.parts]
        assert {*map(os.path.realpath, found)} == {*map(os.path.realpath, expected)}
        assert {*found} <= {*expected}


def test_a_hidden_link_does_not_hide_the_folder_that_it_leads_to(tmp_path):
    for name in ("lr0", "lr1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.pt").touch()
    (tmp_path / ".sync").mkdir()
    (tmp_path / ".sync" / "current").symlink_to("../lr1")
    found = matches_of(str(tmp_path / "**" / "*" / "w.pt"))
    assert sorted(match.parent.name for match in found) == ["lr0", "lr1"]


def test_a_folder_that_may_not_be_entered_is_passed_over(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "w.pt").touch()
    isdir, locked = os.path.isdir, str(tmp_path / "b" / "x")
    # False where it is not permitted to look
    monkeypatch.setattr(os.path, "isdir", lambda path: path != locked and isdir(path))
    assert [*matches_of(str(tmp_path / "*/*/**/*.pt"))] == [tmp_path / "a" / "x" / "w.pt"]


def test_folders_below_each_other_are_searched_once(tmp_path):
    (tmp_path / "/".join("a" * 30)).mkdir(parents=True)
    with patch.object(Path, "glob", autospec=True, side_effect=Path.glob) as looks:
        assert len(list(matches_of(str(tmp_path / "**" / "a" / "**")))) == 30
    assert looks.call_count == 2


@pytest.mark.parametrize("pattern", ["*/*/*/w.pt", "*/*/**/w.pt", "**/*/*/w.pt"])
def test_links_are_followed_once(tmp_path, pattern):
    (tmp_path / "w.pt").touch()
    for i in range(50):
        (tmp_path / f"l{i}").symlink_to(".")
    with patch.object(os, "scandir", wraps=os.scandir) as looks:
        assert len(list(matches_of(str(tmp_path / pattern)))) == 1
    assert looks.call_count < 10
