"""The program on the documentation's page about Lightning and Optuna runs as it stands."""

from __future__ import annotations

import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError, GreedySoup, SoupWarning

from .pages import run

pytest.importorskip("lightning")
pytest.importorskip("optuna")


@pytest.mark.filterwarnings("default")  # of Lightning
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(SoupWarning, match=r"Left out 2 of 8 checkpoints: 'trial_0' .*'trial_1' "):
        found = run("lightning")
    assert found["study"].trials[0].value == float("inf")
    assert found["ckpts"].names == tuple(f"trial_{k}" for k in range(2, 8))
    X, y = found["X_test"], found["y_test"]
    assert found["soup"].score(X, y) > 0.85
    logits = found["classifier"].eval().model(torch.as_tensor(X))
    assert (logits.argmax(1).numpy() == found["soup"].predict(X)).all()
    # what the bullets say
    from_path = CheckpointCollection.from_path
    everything = from_path("study", module=found["build_network"])
    with pytest.raises(CheckpointError, match=r"trial_0.*holds NaN or infinite"):
        GreedySoup().fit(everything, X, y)
    with pytest.warns(SoupWarning, match=r"'trial_1' .*diverged"):
        GreedySoup().fit(everything.drop("trial_0"), X, y)
    with pytest.raises(CheckpointError, match=r"1 of 8 .*trial_0"):
        from_path("study", scores="recorded")
    good = [f"study/trial_{k}" for k in range(2, 8)]
    values = [-trial.value for trial in found["study"].trials[2:]]
    assert list(from_path(good, scores="recorded").scores.values()) == pytest.approx(values)
