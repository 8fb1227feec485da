"""Tiny networks around one start, and rows of three blobs in four dimensions."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from sksoup import CheckpointCollection, LearnedSoup, MEHLSoup

# the papers' own settings
PaperLearned = partial(LearnedSoup, center="mean", clip_deltas=None)
PaperMEHL = partial(MEHLSoup, center="mean", clip_deltas=None, weight_decay=0.0)


class Net(nn.Module):
    """Two layers; BatchNorm brings floating and integer buffers, dropout a use for randomness."""

    def __init__(self, batch_norm: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.hidden(x)).relu()))


class PlainNet(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False)


class Net64(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False, dtype=torch.float64)


@dataclass(frozen=True)
class Zoo:
    checkpoints: CheckpointCollection
    X: np.ndarray  # (60, 4)
    y: np.ndarray  # (60,)


def make_states(
    n: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    batch_norm: bool = True,
    spread: float = 0.2,
) -> list[dict[str, torch.Tensor]]:
    """State dicts around one random start."""
    rng = np.random.default_rng(seed)

    def noise(value: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.as_tensor(rng.normal(size=tuple(value.shape)) * scale).to(dtype)

    reference = Net(batch_norm, dtype).state_dict()
    start = {k: noise(v, 0.7) for k, v in reference.items() if v.is_floating_point()}
    states = []
    for k in range(n):
        state = {name: value + noise(value, spread) for name, value in start.items()}
        if batch_norm:
            state["norm.running_var"] = state["norm.running_var"].abs() + 0.1
            state["norm.num_batches_tracked"] = torch.tensor(10 + k)
        states.append({name: state[name] for name in reference})
    return states


def make_zoo(n: int, seed: int, dtype: torch.dtype = torch.float32, batch_norm: bool = True) -> Zoo:
    rng = np.random.default_rng(seed)
    y = np.arange(60) % 3
    X = (rng.normal(size=(3, 4)) * 1.5)[y] + rng.normal(size=(60, 4))
    module = Net if batch_norm else (Net64 if dtype == torch.float64 else PlainNet)
    states = make_states(n, seed, dtype, batch_norm)
    return Zoo(CheckpointCollection(states, module=module), X.astype(np.float32), y)


def around(start: nn.Module, n: int, spread: float = 0.01) -> list[nn.Module]:
    """Modules around a start, as fine-tuning leaves them."""
    modules = [copy.deepcopy(start) for _ in range(n)]
    for module in modules:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += spread * torch.randn_like(parameter)
    return modules


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names in the same order, same dtypes, same bits."""
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


class Walked(dict):
    """A dict that counts how often its keys are asked for."""

    n_walks = 0

    def __iter__(self):
        self.n_walks += 1
        return super().__iter__()

    def keys(self):
        self.n_walks += 1
        return super().keys()


@contextmanager
def reads():
    """Count how often each checkpoint is opened."""
    opened: dict[str, int] = {}
    original = CheckpointCollection.open

    def counting(self, name):
        opened[name] = opened.get(name, 0) + 1
        return original(self, name)

    with patch.object(CheckpointCollection, "open", counting):
        yield opened
