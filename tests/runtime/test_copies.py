"""A copy of a network computes with its own weights, or is refused."""

from __future__ import annotations

import warnings
from functools import partial
from types import MethodType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, UniformSoup, mix
from sksoup.runtime import copies
from sksoup.runtime.copies import copied

from ..zoo import Net, Zoo, same_tensors


def first(net, x):
    return Net.forward(net, x)


def with_lambda(net):
    call = net.forward
    net.forward = lambda x: call(x)


def with_global(net):
    global GLOBAL
    GLOBAL = net.forward
    net.forward = of_global


def of_global(x):
    return GLOBAL(x)


def compiled(net):
    net.forward = torch.compile(net.forward, backend="eager")


def with_default(net):
    net.forward = lambda x, call=net.forward: call(x)


def with_hook(net):
    net.register_forward_hook(lambda module, x, y: y + 0 * net(*x) if module is not net else y)


def in_a_list(net):
    net.calls = [{"head": partial(lambda call, x: call(x), lambda x: net.head(x))}]


def with_method(net):
    net.forward = MethodType(first, net)


def with_partial(net):
    net.forward = partial(first, net)


def with_name_of_a_global(net):
    """``hidden`` is an attribute in `look`, not the global."""
    global hidden
    hidden = net.hidden
    net.look = MethodType(look, net)


def look(net):
    return net.hidden


def with_own_hook(net):
    seen = []
    net.register_forward_hook(lambda module, x, y: seen.append(y))


@pytest.mark.parametrize(
    "change", [with_lambda, with_global, compiled, with_default, with_hook, in_a_list]
)
def test_functions_that_refer_to_the_network_are_refused(zoo: Zoo, change):
    """Once, each checkpoint had the scores of the network that was passed."""
    net = zoo.checkpoints.build_module()
    change(net)
    with pytest.raises(ValueError, match=r"copy of Net can't be made: .*Define it as a method"):
        copied(net)
    states = dict(zoo.checkpoints)
    with pytest.raises(ValueError, match="copy of Net can't be made"):
        CheckpointCollection(states, module=net)
    if change is with_global:  # which is that of the last network
        return
    nets = []
    for state in states.values():
        nets.append(zoo.checkpoints.build_module())
        nets[-1].load_state_dict(state)
        change(nets[-1])
    collection = CheckpointCollection(nets)
    coef = np.full(len(nets), 1 / len(nets))
    assert same_tensors(mix(collection, coef), mix(zoo.checkpoints, coef))
    with pytest.raises(ValueError, match="copy of Net can't be made"):
        GreedySoup().fit(collection, zoo.X, zoo.y)
    with warnings.catch_warnings(action="ignore"):
        soup = GreedySoup().fit(CheckpointCollection(states, module=Net), zoo.X, zoo.y)
        again = GreedySoup().fit(CheckpointCollection(nets, module=Net), zoo.X, zoo.y)
    assert [*soup.individual_scores_.values()] == [*again.individual_scores_.values()]


@pytest.mark.parametrize(
    "change", [with_method, with_partial, with_own_hook, with_name_of_a_global]
)
def test_what_is_copied_with_the_network_is_taken(zoo: Zoo, change):
    net = zoo.checkpoints.build_module()
    change(net)
    copy = copied(net).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    x = torch.as_tensor(np.asarray(zoo.X[:3]), dtype=next(copy.parameters()).dtype)
    expected = Net.forward(copy, x)
    assert expected.abs().max() > 0
    assert torch.equal(copy(x), expected)
    with warnings.catch_warnings(action="ignore"):
        found = GreedySoup().fit(
            CheckpointCollection(dict(zoo.checkpoints), module=net), zoo.X, zoo.y
        )
        plain = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert [*found.individual_scores_.values()] == [*plain.individual_scores_.values()]


def test_metrics_in_a_network_wrap_their_own_methods_again():
    """As those of torchmetrics do when they are copied."""

    class Metric(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrap()

        def wrap(self):
            update = self.update
            self.update = lambda: update()

        def update(self):
            return id(self)

        def __getstate__(self):
            return {name: value for name, value in vars(self).items() if name != "update"}

        def __setstate__(self, state):
            vars(self).update(state)
            self.wrap()

    net = nn.Sequential(nn.Linear(2, 2), Metric())
    assert copied(net)[1].update() != id(net[1])


def of_a_lambda(net):
    return lambda: net


def of_a_part(net):
    return partial(Around, net)


def of_a_cache(net):
    kept = SimpleNamespace(net=net)
    return SimpleNamespace(build=lambda: kept.net).build


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("factory", [of_a_lambda, of_a_part, of_a_cache])
def test_soups_of_a_factory_that_keeps_its_network_are_apart(zoo: Zoo, factory):
    """Once, the second soup was the first one, too."""
    states = dict(zoo.checkpoints)
    if factory is of_a_part:
        states = {n: {f"inner.{key}": w for key, w in s.items()} for n, s in states.items()}
    net = zoo.checkpoints.build_module()
    before = {name: w.clone() for name, w in net.state_dict().items()}
    collection = CheckpointCollection(states, module=factory(net))
    soups = [UniformSoup(), BestCheckpoint(), UniformSoup()]
    with warnings.catch_warnings(action="ignore"):
        for soup in soups:
            soup.fit(collection, zoo.X, zoo.y)
    uniform, best, again = (soup.state_dict() for soup in soups)
    assert same_tensors(uniform, again)
    assert not same_tensors(uniform, best)
    assert same_tensors(uniform, mix(collection, np.full(len(states), 1 / len(states))))
    if factory is not of_a_cache:  # which can't be seen before the second time
        assert same_tensors(net.state_dict(), before)


def test_new_networks_are_not_copied(zoo: Zoo):
    with patch.object(copies, "copied", side_effect=AssertionError):
        first, second = (zoo.checkpoints.build_module() for _ in range(2))
        del first
        third = zoo.checkpoints.build_module()  # maybe at the place of the first one
    assert second is not third
