"""The zoos of all tables: real fine-tunings, kept in a folder between runs.

Published tables use `SEEDS`, defaults were chosen on `DEVELOPMENT_SEEDS` of the convnet and the
transformer alone: the ResNet and the text encoder were never looked at for that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import torch
import transformers
from sklearn.model_selection import train_test_split
from torch import nn

from sksoup import CheckpointCollection
from sksoup.datasets import _digits, make_digits_checkpoints

sys.path.insert(0, str(Path(__file__).parents[1]))

import text
from zoos import SmallResNet, SmallViT, fine_tune

SEEDS = (10, 11, 12, 13, 14)
DEVELOPMENT_SEEDS = (100, 101, 102)
TEXT_SEED = 10  # of the one set of text fine-tunings


@dataclass(frozen=True)
class Zoo:
    """Fine-tunings from one start, rows that choose and rows that report."""

    checkpoints: CheckpointCollection
    val: tuple[Any, Any]
    test: tuple[Any, Any]


@dataclass(frozen=True)
class Kind:
    """How a zoo is made: ``make(folder, n, seed)`` gives it."""

    title: str
    n: int
    make: Callable[[Path, int, int], Zoo]
    seed: int | None = None  # of the fine-tunings, where all seeds share them


def convnets(folder: Path, n: int, seed: int) -> Zoo:
    digits = make_digits_checkpoints(folder / f"convnet-{seed}", n, random_state=seed)
    return Zoo(
        digits.checkpoints, (digits.X_val, digits.y_val), (digits.X_test, digits.y_test)
    )  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """A network pretrained on digits and fine-tuned on harder ones."""

    name: str
    build: Callable[[], nn.Module]
    epochs: int  # of pretraining

    def __call__(self, folder: Path, n: int, seed: int) -> Zoo:
        here, data = folder / f"{self.name}-{seed}", _digits(seed)
        return Zoo(
            fine_tune(here, n, seed, self.build, self.epochs), data["val"], data["test"]
        )  # fmt: skip


@dataclass(frozen=True)
class TextRows:
    """Docstrings of twelve packages: one part fine-tunes, the rest is cut anew by every seed."""

    n_finetune: int = 960
    n_val: int = 384
    n_test: int = 720
    length: int = 12  # tokens

    def __call__(self, folder: Path, n: int, seed: int) -> Zoo:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        load_texts = joblib.Memory(folder / "texts", verbose=0).cache(text.load_texts)
        counts = self.n_finetune, self.n_val, self.n_test
        parts = load_texts(TEXT_SEED, *counts, length=self.length)  # a minute of parsing
        checkpoints = text.fine_tune_texts(folder / "text", n, TEXT_SEED, parts)
        X = {name: torch.cat([parts.val[0][name], parts.test[0][name]]) for name in parts.val[0]}
        y = torch.cat([parts.val[1], parts.test[1]])
        val, test = train_test_split(
            torch.arange(len(y)), train_size=self.n_val, stratify=y, random_state=seed
        )
        return Zoo(checkpoints, *(({k: v[rows] for k, v in X.items()}, y[rows])
                                  for rows in (val, test)))  # fmt: skip


KINDS = {
    "convnet": Kind("convolutional network", 48, convnets),
    "vit": Kind("vision transformer", 24, Digits("vit", partial(SmallViT, 64, 3, 2), 60)),
    "resnet": Kind("ResNet with BatchNorm", 24, Digits("resnet", SmallResNet, 15)),
    "text": Kind("text encoder", 16, TextRows(), TEXT_SEED),
}
