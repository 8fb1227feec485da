"""The program on the documentation's page about Hugging Face runs as it stands."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pd = pytest.importorskip("pandas")

PROGRAM = """
# [page]
import pandas as pd
from sklearn.model_selection import train_test_split
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sksoup import BestCheckpoint, CheckpointCollection, MEHLSoup

ckpts = CheckpointCollection.from_path("runs")
tokenizer = AutoTokenizer.from_pretrained("runs/seed0")  # of one of the runs

table = pd.read_csv("labeled.csv")  # columns text and label; not used for training
val, test = train_test_split(table, test_size=0.5, stratify=table.label, random_state=0)


def tokenize(part):
    return dict(tokenizer(list(part.text), padding=True, truncation=True, max_length=64,
                          return_tensors="pt"))


X_val, X_test = tokenize(val), tokenize(test)
best = BestCheckpoint().fit(ckpts, X_val, val.label)
soup = MEHLSoup(layerwise=True, random_state=0).fit(ckpts, X_val, val.label)
print(best.score(X_test, test.label), soup.score(X_test, test.label))

soup.save_pretrained("soup")  # a new folder, with the tokenizer and a model card
model = AutoModelForSequenceClassification.from_pretrained("soup")
# [end]
"""  # the page shows this string's lines


def test_the_page(tmp_path, monkeypatch):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["good", "bad", "fine", "poor", "tea", "soup"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(vocabulary))
    config = BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    start = BertForSequenceClassification(config)
    for k in range(3):
        for p in start.parameters():
            p.data += 0.01
        for part in (start, tokenizer):
            part.save_pretrained(tmp_path / "runs" / f"seed{k}")
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    texts = [f"{rng.choice(['bad', 'poor'] if y else ['good', 'fine'])} soup" for y in labels]
    pd.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / "labeled.csv", index=False)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(compile(PROGRAM, "page", "exec"), found)
    predicted = found["model"](**found["X_test"]).logits.argmax(1).numpy()
    right = (predicted == found["test"].label.to_numpy()).mean()
    assert right == pytest.approx(found["soup"].score(found["X_test"], found["test"].label))
    assert (Path("soup") / "tokenizer_config.json").exists()


def test_what_is_shown_is_what_runs():
    """The page includes this file's lines between the first markers: those of the program."""
    page = Path(__file__).parents[1] / "docs" / "huggingface.rst"
    text = page.read_text("utf-8")
    assert "literalinclude:: ../tests/test_hub_page.py" in text
    markers = [re.search(rf":{name}: (.*)", text)[1] for name in ("start-after", "end-before")]
    lines = Path(__file__).read_text("utf-8").splitlines()
    first, last = (next(i for i, line in enumerate(lines) if mark in line) for mark in markers)
    assert lines[first : last + 1] == PROGRAM.strip().splitlines()
