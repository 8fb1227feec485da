"""The program on the page "Train checkpoints that can be mixed" runs as it stands."""

from __future__ import annotations

import re
import shlex
import sys

import numpy as np
import pytest

from sksoup.__main__ import main

from .pages import read, run

MODEL = """
from torch import nn


def build_model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
"""
SCORE = re.compile(r"0\.\d{4}")


def test_the_page_and_the_commands_that_continue_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = run("mixable")
    assert len(found["ckpts"]) == 4
    assert found["ckpts"].healthy().names == found["ckpts"].names  # and no warning
    assert found["soup"].score(found["X_test"], found["y_test"]) > 0.85

    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    for part in ("val", "test"):
        np.savez(f"{part}.npz", X=found[f"X_{part}"], y=found[f"y_{part}"])
    text = read("cli")
    block = text[text.index("$ sksoup mehl 'run-*.pt'") :].split("\n\n")[0]
    for each in block.replace("\\\n", " ").split("$ sksoup ")[1:]:
        command, *shown = each.splitlines()
        capsys.readouterr()
        assert main(shlex.split(command)) == 0
        printed = capsys.readouterr().out.splitlines()
        for ours, theirs in zip(shown, printed, strict=False):
            if ours.strip() == "...":
                break
            assert SCORE.sub("x", theirs) == SCORE.sub("x", ours.strip())
            numbers = [[float(n) for n in SCORE.findall(line)] for line in (ours, theirs)]
            assert numbers[1] == pytest.approx(numbers[0], abs=0.02)
