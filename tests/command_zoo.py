"""A folder as the examples of the command line expect it: checkpoints, data, a module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from .zoo import make_states, make_zoo

transformers = pytest.importorskip("transformers")

MODEL = """
from tests.zoo import Net


def build():
    return Net()


def fails():
    raise RuntimeError("no such GPU")


def number():
    return 3


def needs(width):
    return Net()


NUMBER = 3
"""
WORDS = {"negative": ("bad", "poor", "cold"), "positive": ("good", "fine", "warm")}


def texts(n: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a text and its label."""
    rng = np.random.default_rng(seed)
    labels = ["negative", "positive"] * (n // 2)
    return [(f"a {rng.choice(WORDS[label])}, {rng.choice(WORDS[label])} soup", label)
            for label in labels]  # fmt: skip


def write_csv(path: Path, header: tuple[str, ...], rows: Any) -> None:
    lines = [",".join(header)]
    lines += [",".join(f'"{c}"' if "," in str(c) else str(c) for c in row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _save_berts(folder: Path) -> None:
    t = transformers
    words = sorted({word for known in WORDS.values() for word in known} | {"a", "soup", ","})
    folder.joinpath("vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    tokenizer = t.BertTokenizerFast(str(folder / "vocab.txt"))
    config = t.BertConfig(
        vocab_size=len(words) + 5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
        id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = t.BertForSequenceClassification(config)
        for name in ("base", "runs/ft0", "runs/ft1", "runs/ft2"):
            net = copy.deepcopy(start)
            with torch.no_grad():
                for parameter in net.parameters() if name != "base" else ():
                    parameter += 0.005 * torch.randn_like(parameter)
            net.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)


def make_folder(folder: Path) -> None:
    """Hugging Face folders in ``runs``, plain files in ``nets``, their starts, and data."""
    _save_berts(folder)
    (folder / "nets").mkdir()
    states = make_states(4, seed=0)
    for k, state in enumerate(states[:3]):
        save_file(state, folder / "nets" / f"ft{k}.safetensors")
    save_file(states[3], folder / "start.safetensors")
    (folder / "model.py").write_text(MODEL)
    zoo = make_zoo(1, seed=0)
    for name, rows in {"val": slice(0, None, 2), "test": slice(1, None, 2)}.items():
        np.savez(folder / f"{name}.npz", X=zoo.X[rows], y=zoo.y[rows])
        write_csv(folder / f"{name}.csv", ("text", "label"), texts(30, seed=len(name)))
    table = [(*x, ("cat", "dog", "owl")[y]) for x, y in zip(zoo.X, zoo.y, strict=True)]
    write_csv(folder / "table.csv", ("a", "b", "c", "d", "species"), table)
