"""Small searches, and what their tests ask of them."""

from __future__ import annotations

import torch
from skorch import NeuralNetClassifier
from torch import nn

from sksoup.model_selection import SoupSearchCV

from ..zoo import PlainNet, same_tensors

LR = {"lr": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]}


def net_of(module=None, kind=NeuralNetClassifier, **kwargs):
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = PlainNet()
    settings = {"criterion": nn.CrossEntropyLoss, "max_epochs": 2, "verbose": 0,
                "train_split": None, **kwargs}  # fmt: skip
    return kind(module, **settings)


def search_of(net=None, **kwargs):
    settings = {"n_iter": 4, "random_state": 0, **kwargs}
    return SoupSearchCV(net or net_of(), settings.pop("param_distributions", LR), **settings)


def same_soup(a, b):
    """Files keep their tensors in order of name."""
    a, b = (dict(sorted(search.soup_.state_dict().items())) for search in (a, b))
    return same_tensors(a, b)


def unrelated(collection):
    collection.check()
    return collection.strangers(collection.names)
