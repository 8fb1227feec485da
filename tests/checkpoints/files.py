"""Files that tests write and read."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file
from skorch import NeuralNetClassifier
from skorch.dataset import ValidSplit
from torch import nn

from sksoup.checkpoints import sources

from ..zoo import Net

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def write_file(path, state, legacy=False):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


def read_all(path, key=None):
    weights = sources.open_checkpoint(path, key)
    with weights.open() as read:
        return {name: read(name).clone() for name in weights.header}


def fitted_net(**kwargs):
    torch.manual_seed(0)
    X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    y = np.arange(40) % 3
    net = NeuralNetClassifier(
        Net, criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0,
        train_split=ValidSplit(2), **kwargs,
    )  # fmt: skip
    return net.fit(X, y), X, y
