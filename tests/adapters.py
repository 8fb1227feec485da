"""Adapters that peft writes for a small network with layers of every kind."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

TARGETS = ("emb", "lin", "conv1d", "conv", "conv2")
# one dict of LoraConfig's fields for each adapter: ranks, scales and targets differ
CONFIGS: tuple[dict[str, Any], ...] = (
    {"r": 2, "lora_alpha": 4, "target_modules": list(TARGETS), "rank_pattern": {"lin": 5}},
    {"r": 4, "lora_alpha": 3, "target_modules": ["lin", "conv1d"], "use_rslora": True,
     "bias": "all"},
    {"r": 3, "lora_alpha": 8, "target_modules": r"(emb|conv2?)", "bias": "lora_only"},
    {"r": 2, "lora_alpha": 4, "target_modules": ["lin", "conv"], "alpha_pattern": {"conv": 7}},
)  # fmt: skip


class Net(nn.Module):
    """An embedding, a linear layer, GPT-2's transposed one, two convolutions, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 12)
        self.conv1d = Conv1D(8, 12)
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 2, (2, 3), padding=1)
        self.norm = nn.LayerNorm(72)
        self.head = nn.Linear(72, 3)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.lin(self.emb(x).mean(dim=1)))
        h = self.conv(torch.tanh(self.conv1d(h))[:, None])
        return self.head(self.norm(self.conv2(h[:, None]).flatten(1)[:, :72]))


def build() -> Net:
    """The base: the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def peft_model(k: int = 0, base: nn.Module | None = None, **changes: Any) -> PeftModel:
    """The base with an adapter that has been moved away from it, as if trained."""
    fields = {"modules_to_save": ["head"], **CONFIGS[k % len(CONFIGS)], **changes}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft notes that it sets fan_in_fan_out for Conv1D
        torch.manual_seed(k + 1)
        model = get_peft_model(build() if base is None else base, LoraConfig(**fields))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def save_adapters(folder: Path, n: int = 4, **changes: Any) -> list[nn.Module]:
    """Write n PEFT folders; the same adapters, merged by peft."""
    merged = []
    for k in range(n):
        model = peft_model(k, **changes)
        model.save_pretrained(str(folder / f"a{k}"))
        merged.append(merge(model))
    return merged


def merge(model: PeftModel) -> nn.Module:
    """The whole network, by peft's own rule."""
    merged: nn.Module = copy.deepcopy(model).merge_and_unload().eval()
    return merged


def rows(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(7)
    X = torch.randint(0, 20, (n, 5), generator=generator)
    return X, torch.randint(0, 3, (n,), generator=generator)
