"""The program on the documentation's page about a sweep of Trainer runs as it stands."""

from __future__ import annotations

import inspect
import os
import statistics
import string
from pathlib import Path

import pytest
import torch

from sksoup import CheckpointCollection
from sksoup.__main__ import main

from .pages import run

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")


def texts() -> pd.DataFrame:
    """First lines of docstrings: 1 for statistics and strings, 0 for the operating system."""
    found = [
        (inspect.getdoc(value).split("\n")[0].lower().strip("."), label)
        for label, holders in enumerate([(os, os.path), (statistics, string, str)])
        for holder in holders
        for _, value in inspect.getmembers(holder, callable)
        if inspect.getdoc(value) and "(" not in inspect.getdoc(value).split("\n")[0]
    ]
    frame = pd.DataFrame(found, columns=["text", "label"])
    return frame.groupby("label").head(60)


def save_pretrained(frame: pd.DataFrame, folder: Path) -> None:
    """A small BERT with a vocabulary of the words of these texts, trained on them for a while."""
    folder.mkdir()
    words = sorted({word for text in frame.text for word in text.split()})
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(str(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = tokenizer(list(frame.text), padding=True, return_tensors="pt")
    for _ in range(10):
        optimizer.zero_grad()
        model(**rows, labels=torch.tensor(frame.label.tolist())).loss.backward()
        optimizer.step()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


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
