"""The program on the documentation's page about a sweep of Trainer runs as it stands."""

from __future__ import annotations

import pytest

from sksoup import CheckpointCollection
from sksoup.__main__ import main

from .pages import run
from .small_bert import save_pretrained, texts

pytest.importorskip("accelerate")
pytest.importorskip("datasets")


@pytest.mark.filterwarnings("default")  # of transformers
def test_the_page(tmp_path, monkeypatch):
    frame = texts()
    frame.to_csv(tmp_path / "texts.csv", index=False)
    save_pretrained(frame, tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    found = run("trainer")
    assert found["ckpts"].names == ("run-0", "run-1", "run-2", "run-3")
    soup, model = found["soup"], found["model"]
    predicted = model(**found["X_test"]).logits.argmax(1).numpy()
    right = (predicted == found["test"].label.to_numpy()).mean()
    assert right == pytest.approx(soup.score(found["X_test"], found["test"].label))
    assert soup.score(found["X_test"], found["test"].label) > 0.6
    assert (tmp_path / "soup" / "tokenizer.json").exists()
    assert main(["verify", "soup", "sweep"]) == 0
    # what the bullets say
    from_path = CheckpointCollection.from_path
    recorded = from_path("sweep", scores="recorded").scores
    assert recorded["run-3"] == pytest.approx(-found["trainer"].state.best_metric)
    assert from_path("sweep", which="last").names == found["ckpts"].names
    assert len(from_path("sweep", which="all")) >= 4
