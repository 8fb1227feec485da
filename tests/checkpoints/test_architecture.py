"""The module is that of the user, or that of a net."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, UniformSoup

from ..zoo import Net, Zoo, make_states, same_tensors
from .files import fitted_net


def test_fitted_skorch_nets_bring_weights_and_module():
    nets = [fitted_net()[0] for _ in range(2)]
    collection = CheckpointCollection(nets)
    assert same_tensors(collection["checkpoint1"], dict(nets[1].module_.state_dict()))
    assert isinstance(collection.build_module(), Net)


def test_a_skorch_net_says_the_architecture():
    net = NeuralNetClassifier(Net, criterion=nn.CrossEntropyLoss)
    states = make_states(2, seed=0)
    before = torch.get_rng_state()
    collection = CheckpointCollection(states, module=net)
    assert isinstance(collection.build_module(), Net)
    assert torch.equal(torch.get_rng_state(), before)
    assert not hasattr(net, "module_")


def test_a_module_factory_leaves_random_state_alone():
    collection = CheckpointCollection(make_states(2, seed=0), module=Net)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    collection.build_module()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_without_a_module_it_can_average_but_not_predict():
    with pytest.raises(CheckpointError, match="has no module"):
        CheckpointCollection(make_states(2, seed=0)).build_module()
    with pytest.raises(TypeError, match="returned a int, expected an"):
        CheckpointCollection(make_states(2, seed=0), module=lambda: 3).build_module()


class Other(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.another = torch.nn.Linear(4, 3)

    def forward(self, X):
        return self.another(X)


def test_another_architecture_is_still_another_architecture(zoo: Zoo):
    with pytest.raises(CheckpointError, match=r"Pass the architecture from which they were saved"):
        UniformSoup().fit(CheckpointCollection(zoo.checkpoints, module=Other), zoo.X, zoo.y)


def build(width, *, depth):
    return nn.Linear(width, depth)


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (nn.Linear, r"module=Linear needs arguments \(in_features, out_features\), expected a fac"),
        (build, r"build needs arguments \(width, depth\).*module=lambda: build\(\.\.\.\).*partial"),
        (partial(build, 3), r"needs arguments \(depth\)"),
    ],
)
def test_factories_take_no_arguments(factory, match):
    with pytest.raises(TypeError, match=match):
        CheckpointCollection([{"w": torch.ones(1)}], module=factory)


@pytest.mark.parametrize(
    "factory", [partial(nn.Linear, 2, 3), lambda *rows, size=2, **more: nn.Linear(size, 3)]
)
def test_arguments_that_have_values_are_none_that_lack(factory):
    collection = CheckpointCollection([nn.Linear(2, 3)], module=factory)
    assert collection.build_module().in_features == 2
