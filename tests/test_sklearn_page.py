"""The program on the documentation's page about scikit-learn and skorch runs as it stands."""

from __future__ import annotations

import re

import pytest
import torch

from .pages import read, run

SCORE = re.compile(r"\d+\.\d(?= %)")


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = run("sklearn")
    printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines()[:2])
    (shown,) = re.findall(r"code-block:: text\n\n((?:    .*\n)+)", read("sklearn"))
    assert SCORE.sub("x", printed) == SCORE.sub("x", shown)
    scores = [[float(score) for score in SCORE.findall(text)] for text in (printed, shown)]
    assert scores[0] == pytest.approx(scores[1], abs=2)  # fine-tuned on another processor
    assert len(list((tmp_path / "candidates").glob("*.safetensors"))) == 8
    nested, weighted = found["results"], found["weighted"]
    assert nested["test_score"].min() > 0.75
    assert (nested["test_score"] != weighted["test_score"]).any()
    # the outer folds start from the trained weights, the scaler is the one that was frozen
    for scaler, search in (fitted.named_steps.values() for fitted in nested["estimator"]):
        assert (scaler.mean_ == found["scaler"].mean_).all()
        start = search.estimator.module.state_dict()
        assert all(
            torch.equal(w, start[name]) for name, w in found["net"].module_.state_dict().items()
        )
