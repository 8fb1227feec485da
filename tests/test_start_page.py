"""The page "Get started" runs top to bottom, and prints what it shows."""

from __future__ import annotations

import contextlib
import io
import re
from textwrap import dedent

import pytest
import torch

from sksoup.datasets import load_digits_checkpoints

from .pages import read

BLOCK = re.compile(r"\.\. code-block:: (python|text)\n\n((?:    .*\n|\n)+)")
NUMBER = re.compile(r"[+-]?\d+\.\d+")


def scores(text: str) -> list[float]:
    """The numbers of a text; of a row of the table the first two, its scores."""
    return [float(n) for line in text.splitlines() for n in NUMBER.findall(line)[:2]]


def words(text: str) -> list[str]:
    """The words of a text without the scores, and without the lines between columns."""
    return [word for word in NUMBER.sub("x", text).split() if word.strip("-") or word == "-"]


def test_the_page_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    blocks = [(kind, dedent(text).strip()) for kind, text in BLOCK.findall(read("start"))]
    assert blocks[0][0] == "python"
    assert sum(kind == "text" for kind, _ in blocks) == 6
    zoo = load_digits_checkpoints(tmp_path / "zoo")
    found: dict[str, object] = {"X": zoo.X_test, "y": zoo.y_test}  # what a reader has
    for (kind, text), (after, shown) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, "start.rst", "exec"), found)
            said = printed.getvalue().strip()
            expected = shown if after == "text" else ""
            assert words(said) == words(expected)
            assert scores(said) == pytest.approx(scores(expected), abs=0.15)
    assert (tmp_path / "soup.html").exists()
    rows = torch.as_tensor(found["X_test"])
    assert torch.equal(found["net"](rows), found["soup"].module_(rows))
