"""A small language model, pretrained here on docstrings and fine-tuned on another package's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import nn

from sksoup import CheckpointCollection

from . import zoo

TARGET = "torch"  # whose docstrings are fine-tuned on
LENGTH = 32  # tokens
VOCABULARY = 4096
PRETRAINING = {"epochs": 4, "lr": 1e-3, "batch_size": 64}
N_FINETUNE, N_VAL, N_TEST = 1200, 300, 900
Rows = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Corpus:
    """Token ids of the texts, padded with 0: of all other packages, and of the target's."""

    tokenizer: str  # JSON
    others: torch.Tensor
    target: torch.Tensor


def load_corpus(seed: int) -> Corpus:
    """Parse the packages, train a tokenizer on all but the target, and encode the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    packages = [name for name in zoo.PACKAGES if name != TARGET]
    others = sorted({text for name in packages for text in zoo.docstrings(name)})
    target = sorted(set(zoo.docstrings(TARGET)) - set(others))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(others, trainer)
    rng = np.random.default_rng(seed)

    def encode(texts: Sequence[str]) -> torch.Tensor:
        ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
        for row, k in zip(ids, rng.permutation(len(texts)), strict=True):
            found = [*tokenizer.encode(texts[k]).ids, 1][:LENGTH]
            row[: len(found)] = torch.tensor(found)
        return ids

    return Corpus(tokenizer.to_str(), encode(others), encode(target))


def rows_of(ids: torch.Tensor) -> Rows:
    """Inputs and labels: padding is left out of both."""
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100)


def build() -> nn.Module:
    """A GPT-2 of 2.6 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=192, n_layer=4, n_head=6,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train(
    model: Any, ids: torch.Tensor, *, lr: float, weight_decay: float, epochs: int, seed: int,
    batch_size: int = 32,
) -> None:  # fmt: skip
    """Train in place what requires a gradient: AdamW, a short warm-up, a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    n_steps = epochs * -(-len(ids) // batch_size)
    warm = max(1, n_steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / n_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        for _ in range(epochs):
            for part in torch.randperm(len(ids), generator=generator).split(batch_size):
                X, y = rows_of(ids[part])
                loss = model(**X, labels=y).loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
    model.eval()


@dataclass(frozen=True)
class Tuning:
    """Hyper-parameters of a fine-tuning; a rank of 0 is all weights."""

    lr: float
    weight_decay: float
    epochs: int
    rank: int = 0
    alpha: int = 0


def draw(seed: int, k: int, is_lora: bool) -> Tuning:
    """The k-th fine-tuning's hyper-parameters."""
    rng = np.random.default_rng([seed, k, is_lora])
    low, high = (-3.0, -1.8) if is_lora else (-4.0, -2.8)
    tuning = Tuning(
        10 ** rng.uniform(low, high), 10 ** rng.uniform(-4, -1), int(rng.integers(3, 9))
    )
    if not is_lora:
        return tuning
    rank = int(rng.choice([2, 4, 8, 16]))
    return Tuning(*list(vars(tuning).values())[:3], rank, rank * int(rng.choice([1, 2])))


@dataclass(frozen=True)
class LanguageRows:
    """The fine-tunings of one seed; the held-out and test rows are cut anew by every seed."""

    is_lora: bool
    seed: int

    def __call__(self, folder: Path, n: int, seed: int) -> zoo.Zoo:
        here = folder / "language"
        corpus = joblib.Memory(here, verbose=0).cache(load_corpus)(self.seed)
        if not (here / "pretrained").exists():
            self._pretrain(here, corpus)
        finetune = corpus.target[:N_FINETUNE]
        rest = corpus.target[N_FINETUNE : N_FINETUNE + N_VAL + N_TEST]
        val, test = train_test_split(torch.arange(len(rest)), train_size=N_VAL, random_state=seed)
        paths = []
        for k in range(n):
            path = here / f"{'lora' if self.is_lora else 'full'}{k:02d}"
            if not path.exists():
                self._tuned(here, k, finetune).save_pretrained(
                    str(part := path.with_suffix(".part"))
                )
                part.rename(path)
            paths.append(path)
        base = partial(_load, here / "pretrained") if self.is_lora else None
        checkpoints = CheckpointCollection(paths, module=base)

        def retrain(name: str) -> Mapping[str, torch.Tensor]:
            both = torch.cat([finetune, rest[val]])
            model = self._tuned(here, checkpoints.names.index(name), both)
            found: Mapping[str, torch.Tensor] = (
                model.merge_and_unload() if self.is_lora else model
            ).state_dict()
            return found

        return zoo.Zoo(checkpoints, rows_of(rest[val]), rows_of(rest[test]), retrain=retrain)

    def _pretrain(self, here: Path, corpus: Corpus) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model: Any = build()
        train(model, corpus.others, weight_decay=0.1, seed=self.seed, **PRETRAINING)
        model.save_pretrained(part := here / "pretrained.part")
        (part / "tokenizer.json").write_text(json.dumps(json.loads(corpus.tokenizer)))
        part.rename(here / "pretrained")

    def _tuned(self, here: Path, k: int, ids: torch.Tensor) -> Any:
        tuning = draw(self.seed, k, self.is_lora)
        model: Any = _load(here / "pretrained")
        if self.is_lora:
            from peft import LoraConfig, get_peft_model

            with torch.random.fork_rng():
                torch.manual_seed(1000 * self.seed + k)
                model = get_peft_model(model, LoraConfig(
                    task_type="CAUSAL_LM", r=tuning.rank, lora_alpha=tuning.alpha,
                    target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
                ))  # fmt: skip
        train(
            model, ids, lr=tuning.lr, weight_decay=tuning.weight_decay, epochs=tuning.epochs, seed=k
        )
        return model


def _load(folder: Path) -> nn.Module:
    from transformers import GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
    return model
