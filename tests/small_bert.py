"""A small BERT, pretrained for a moment on docstrings, for pages that begin with one."""

from __future__ import annotations

import inspect
import os
import statistics
import string
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
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
