"""The page "Get started" runs top to bottom, and prints what it shows."""

from __future__ import annotations

import contextlib
import io
import re
from textwrap import dedent

import pytest
import torch

from .pages import read

BLOCK = re.compile(r"\.\. code-block:: (python|text)\n\n((?:    .*\n|\n)+)")
SCORE = re.compile(r"\d+\.\d(?= %)")


def test_the_page_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    blocks = [(kind, dedent(text).strip()) for kind, text in BLOCK.findall(read("start"))]
    assert blocks[0][0] == "python"
    assert sum(kind == "text" for kind, _ in blocks) == 5
    found: dict[str, object] = {}
    for (kind, text), (after, shown) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, "start.rst", "exec"), found)
            said = printed.getvalue().strip()
            expected = shown if after == "text" else ""
            assert SCORE.sub("x", said) == SCORE.sub("x", expected)
            scores = [list(map(float, SCORE.findall(each))) for each in (said, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=0.15)
    assert (tmp_path / "soup.html").exists()
    rows = torch.as_tensor(found["X_test"])
    assert torch.equal(found["net"](rows), found["soup"].module_(rows))
