"""Small language models of every kind, and texts for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sksoup import CheckpointCollection

transformers = pytest.importorskip("transformers")

VOCABULARY = 50
KINDS = ("gpt2", "llama", "bert", "t5")


def build(kind: str, vocabulary: int = VOCABULARY) -> nn.Module:
    """A small model with random weights, the same each time."""
    t = transformers
    bert: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": vocabulary, "intermediate_size": 32, "max_position_embeddings": 32,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(
                n_embd=16, n_layer=1, n_head=2, vocab_size=vocabulary, n_positions=32,
                bos_token_id=1, eos_token_id=2,
            ))  # fmt: skip
        if kind == "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**bert, tie_word_embeddings=False))
        if kind == "bert":
            return t.BertForMaskedLM(t.BertConfig(**bert))
        return t.T5ForConditionalGeneration(t.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=vocabulary,
            decoder_start_token_id=0, pad_token_id=0,
        ))  # fmt: skip


def checkpoints(
    kind: str, n: int = 4, spread: float = 0.05, **options: Any
) -> CheckpointCollection:
    """Fine-tunings of one start, but for the training."""
    nets = []
    for k in range(n):
        net = copy.deepcopy(build(kind, **options))
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += spread * torch.randn(parameter.shape, generator=generator)
        nets.append(net.eval())
    return CheckpointCollection(nets)


def texts(
    kind: str, n: int = 30, length: int = 9, side: str = "right", seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs with padding on a side, and labels as transformers' collators make them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (n, length), generator=generator)
    keep = torch.randint(3, length + 1, (n,), generator=generator)
    places = torch.arange(length).expand(n, -1)
    mask = (places < keep[:, None]) if side == "right" else (places >= length - keep[:, None])
    X = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    if kind == "t5":
        y = torch.randint(5, VOCABULARY, (n, 6), generator=generator)
        y[::2, 4:] = -100
        return X, y
    if kind == "bert":
        chosen = mask & (torch.rand(ids.shape, generator=generator) < 0.4)
        chosen[:, length // 2] |= mask[:, length // 2]
        X["input_ids"] = X["input_ids"].masked_fill(chosen, 4)
        return X, ids.masked_fill(~chosen, -100)
    return X, ids.masked_fill(~mask, -100)


@torch.no_grad()
def reference(module: nn.Module, X: dict[str, torch.Tensor], y: torch.Tensor) -> float:
    """transformers' own loss over one batch of all rows."""
    return float(module.eval()(**X, labels=y).loss)
