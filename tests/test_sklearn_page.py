"""The program on the documentation's page about scikit-learn and skorch runs as it stands."""

from __future__ import annotations

import torch

from .pages import run


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("sklearn")
    assert len(list((tmp_path / "candidates").glob("*.safetensors"))) == 6
    assert found["model"].score(found["X_rest"], found["y_rest"]) > 0.85
    nested, weighted = found["results"], found["weighted"]
    assert nested["test_score"].min() > 0.85
    assert (nested["test_score"] != weighted["test_score"]).any()
    # the outer folds start from the trained weights, the scaler is the one that was frozen
    for scaler, search in (fitted.named_steps.values() for fitted in nested["estimator"]):
        assert (scaler.mean_ == found["scaler"].mean_).all()
        start = search.estimator.module.state_dict()
        assert all(
            torch.equal(w, start[name]) for name, w in found["net"].module_.state_dict().items()
        )
