"""A network of several blocks whose rows don't divide by the ranks, and a zoo of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sksoup import CheckpointCollection


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 2 * width + 1), nn.Linear(2 * width + 1, width)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return X + self.outer(nn.functional.gelu(self.inner(self.norm(X))))


class Blocks(nn.Module):
    """Four blocks, three classes (one rank of four has no row of the head), unsaved positions."""

    def __init__(self, width: int = 13, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.register_buffer("position", torch.linspace(-1, 1, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.spare = nn.Parameter(torch.zeros(5))  # differs, and no output depends on it

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(X) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def make_wide_zoo(folder: Path, n: int, width: int, depth: int) -> int:
    """Write checkpoints that no one has fitted, and 61 rows; the bytes of one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Blocks(width, depth).state_dict()
        states = [{m: w + 1e-3 * torch.randn_like(w) for m, w in start.items()} for _ in range(n)]
        X, y = torch.randn(61, 8), torch.arange(61) % 3
    collection = CheckpointCollection(states).save(folder / "zoo")
    np.savez(folder / "rows.npz", X=X, y=y)
    return collection.nbytes


def make_llamas(folder: Path) -> None:
    """Write three folders of a small Llama with tied embeddings, and 12 texts."""
    from transformers import LlamaConfig, LlamaForCausalLM  # which most jobs need not wait for

    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=51, max_position_embeddings=16, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = LlamaForCausalLM(config)
        start = {name: w.clone() for name, w in net.state_dict().items()}
        for k in range(3):
            noise = {
                n: 2e-3 * torch.randn_like(w) for n, w in start.items() if n != "lm_head.weight"
            }
            net.load_state_dict({n: w + noise.get(n, 0) for n, w in start.items()})
            net.tie_weights()
            net.save_pretrained(folder / "llama" / f"run{k}")
        np.savez(folder / "rows.npz", ids=torch.randint(3, 51, (12, 10)))


def make_zoo(folder: Path, n: int = 5) -> None:
    """Write checkpoints around a start that is fitted a little, and 61 rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Blocks()
        X = torch.randn(400, 8)
        y = (X @ torch.randn(8, 3) + 0.5 * torch.randn(400, 3)).argmax(dim=1)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X[:200]), y[:200]).backward()
            optimizer.step()
        start = net.state_dict()
        states = []
        for k in range(n):
            state = {name: w + 0.1 * torch.randn_like(w) * w.std() for name, w in start.items()}
            state["blocks.2.norm.weight"] = start["blocks.2.norm.weight"]  # is equal everywhere
            state["embed.weight"][:7] = start["embed.weight"][:7]  # are equal on some ranks
            state["spare"] = torch.full((5,), float(k))
            states.append(state)
    CheckpointCollection(states).save(folder / "zoo")
    np.savez(folder / "rows.npz", X=X[200:261], y=y[200:261], weight=0.5 + np.arange(61) % 3)
