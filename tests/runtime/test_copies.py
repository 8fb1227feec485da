"""A copy of a network computes with its own weights, or is refused."""

from __future__ import annotations

import warnings
from functools import partial
from types import MethodType, SimpleNamespace
from unittest.mock import patch

import joblib
import numpy as np
import pytest
import torch
from torch import nn

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, UniformSoup, mix
from sksoup.inspection import ingredient_importance
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
    return next(GLOBAL(x) for _ in range(1))


def compiled(net):
    net.forward = torch.compile(net.forward, backend="eager")


def with_default(net):
    net.forward = lambda x, call=net.forward: call(x)


def with_hook(net):
    net.hidden.register_forward_hook(lambda module, x, y: net.hidden.weight.sum() + y)


def with_part(net):
    """A module that is not a part of the network, but has one of its layers."""
    layers, head = nn.Sequential(net.hidden, net.norm, nn.ReLU()), net.head
    net.forward = lambda x: head(layers(x))


def with_itself(net):
    def forward(x, n=3):
        return forward(x, n - 1) if n else call(x)

    call = net.forward
    net.forward = forward


def in_a_list(net):
    calls = [{"all": partial(lambda call, x: call(x), net.forward)}]
    net.calls, net.forward = calls, lambda x: calls[0]["all"](x)


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


CHANGES = [
    with_lambda, compiled, with_default, with_hook, in_a_list, with_part, with_itself, with_method,
    with_partial, with_own_hook, with_name_of_a_global,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_functions_of_a_copy_refer_to_the_copy(zoo: Zoo, change):
    """Once, each checkpoint had the scores of the network that was passed."""
    net = zoo.checkpoints.build_module()
    change(net)
    x = torch.as_tensor(np.asarray(zoo.X[:3]), dtype=next(net.parameters()).dtype)
    expected = net.eval()(x)
    found, again = copied(net), copied(copied(net))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert not torch.equal(net(x), expected)
    assert torch.equal(found(x), expected)
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("change", [with_lambda, compiled, with_hook, with_part, with_method])
def test_each_checkpoint_is_scored_with_its_own_weights(zoo: Zoo, change):
    net = zoo.checkpoints.build_module()
    change(net)
    states, nets = dict(zoo.checkpoints), []
    for state in states.values():
        nets.append(zoo.checkpoints.build_module())
        nets[-1].load_state_dict(state)
        change(nets[-1])

    def build():
        made = zoo.checkpoints.build_module()
        change(made)
        return made

    x = torch.as_tensor(np.asarray(zoo.X), dtype=next(net.parameters()).dtype)
    expected = []
    for state in states.values():
        one = build().eval()
        one.load_state_dict(state)
        expected.append((one(x).argmax(1).numpy() == zoo.y).mean())
    assert len({*expected}) > 1
    values = []
    with warnings.catch_warnings(action="ignore"):
        for given, module in ((states, net), (nets, None), (states, build)):
            collection = CheckpointCollection(given, module=module)
            for n_jobs in (None, 2):
                with joblib.parallel_config("threading"):
                    soup = GreedySoup(n_jobs=n_jobs).fit(collection, zoo.X, zoo.y)
                assert [*soup.individual_scores_.values()] == pytest.approx(expected)
            soup = UniformSoup().fit(collection, zoo.X, zoo.y)
            found = ingredient_importance(soup, zoo.X, zoo.y, scoring="neg_log_loss")
            values.append([*found.importances.values()])
    assert values[0] == values[1] == values[2]
    assert len({*values[0]}) > 1


def test_functions_that_find_the_network_as_a_global_are_refused(zoo: Zoo):
    net = zoo.checkpoints.build_module()
    with_global(net)
    for copy in (copied, lambda net: CheckpointCollection(dict(zoo.checkpoints), module=net)):
        with pytest.raises(ValueError, match=r"copy of Net can't be made: .*Define it as a method"):
            copy(net)
    collection = CheckpointCollection([net])
    assert same_tensors(mix(collection, [1.0]), net.state_dict())
    with pytest.raises(ValueError, match="copy of Net can't be made"):
        GreedySoup().fit(collection, zoo.X, zoo.y)


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


def of_a_table(net):
    """Such as nn.Embedding.from_pretrained(vectors, freeze=False)."""

    def build():
        made = copies.copy.deepcopy(net)
        made.hidden.weight = nn.Parameter(TABLE)
        return made

    global TABLE
    TABLE = net.hidden.weight.detach()
    return build


class OfATable(Net):
    """The same as a class."""

    def __init__(self):
        super().__init__()
        self.hidden.weight = nn.Parameter(TABLE)


def of_a_class(net):
    of_a_table(net)
    return OfATable


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("factory", [of_a_lambda, of_a_part, of_a_cache, of_a_table, of_a_class])
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
