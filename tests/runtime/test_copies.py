"""A copy of a network computes with its own weights, or is refused."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from functools import cache, partial
from types import MethodType, ModuleType, SimpleNamespace
from unittest.mock import patch
from weakref import proxy

import joblib
import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import nn

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, UniformSoup, mix
from sksoup.inspection import ingredient_importance
from sksoup.runtime import copies
from sksoup.runtime.copies import copied

from ..zoo import Net, Zoo, make_zoo, same_tensors


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
        skorch_net = NeuralNetClassifier(net, criterion=nn.CrossEntropyLoss)
        for given, module in ((states, net), (nets, None), (states, build), (states, skorch_net)):
            collection = CheckpointCollection(given, module=module)
            for n_jobs in (None, 2):
                with joblib.parallel_config("threading"):
                    soup = GreedySoup(n_jobs=n_jobs).fit(collection, zoo.X, zoo.y)
                assert [*soup.individual_scores_.values()] == pytest.approx(expected)
            soup = UniformSoup().fit(collection, zoo.X, zoo.y)
            found = ingredient_importance(soup, zoo.X, zoo.y, scoring="neg_log_loss")
            values.append([*found.importances.values()])
    assert values[0] == values[1] == values[2] == values[3]
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


def with_lock(net):
    net.lock = threading.Lock()


def with_last_output(net):
    net.last = net(torch.zeros(2, 4))


def with_weight_norm(net):
    with warnings.catch_warnings(action="ignore"):
        torch.nn.utils.weight_norm(net.hidden)


def with_scripted_function(net):
    with warnings.catch_warnings(action="ignore"):
        net.act = torch.jit.script(scripted)


def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def with_shared_lock(net):
    net.lock = multiprocessing.Lock()


UNCOPIED = [
    with_lock, with_last_output, with_weight_norm, with_scripted_function, with_shared_lock,
]  # fmt: skip


@pytest.mark.parametrize("change", UNCOPIED)
def test_networks_that_can_not_be_copied_are_mixed_and_else_refused(zoo: Zoo, change):
    nets = [copies.copy.deepcopy(zoo.checkpoints.build_module()) for _ in range(2)]
    for net in nets:
        change(net)
    assert same_tensors(mix(nets, [0.0, 1.0]), nets[1].state_dict())
    states = [net.state_dict() for net in nets]
    for fit in (
        lambda: GreedySoup().fit(CheckpointCollection(nets), zoo.X, zoo.y),
        lambda: CheckpointCollection(states, module=nets[0]),
        lambda: GreedySoup().fit(
            CheckpointCollection(states, module=Keeper(nets[0])), zoo.X, zoo.y
        ),
    ):
        with pytest.raises(ValueError, match=r"copy of Net can't be made \(.*module=build_model"):
            fit()


def test_a_copy_without_memory_is_out_of_memory(zoo: Zoo):
    """As the searches ask for less then."""
    net = zoo.checkpoints.build_module()
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: 8 bytes")):
        with (
            patch.object(copies.copy, "deepcopy", side_effect=error),
            pytest.raises(type(error), match=str(error)),
        ):
            copied(net)


def test_what_functions_of_all_layers_refer_to_is_looked_at_once():
    """Once, 800 layers with a function that refers to the network took 17 s."""
    looks = []
    for n in (8, 32):
        net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(n)))
        for layer in net:
            layer.call = lambda x, net=net, layer=layer: layer(x) / len(net)
        with patch.object(copies, "_within", wraps=copies._within) as look:
            found = copied(net)
        looks.append(look.call_count)
        expected = net[5](torch.ones(2))
        with torch.no_grad():
            net[5].bias += 1
        assert torch.equal(n * found[5].call(torch.ones(2)), expected)
    assert looks[1] < 4.5 * looks[0]


def test_words_in_a_network_are_not_looked_at():
    net = nn.Linear(2, 2)
    net.words = {f"word{k}": k for k in range(1000)}
    with patch.object(copies, "_within", wraps=copies._within) as look:
        copied(net)
    assert look.call_count < 100


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


def of_a_subclass(net):
    of_a_table(net)
    return type("Inherits", (OfATable,), {})


def of_an_array(net):
    """The network itself is new."""
    array = net.hidden.weight.detach().numpy().copy()

    def build():
        made = copies.copy.deepcopy(net)
        made.hidden.weight = nn.Parameter(torch.from_numpy(array))
        return made

    build.array = array
    return build


def of_a_cached_function(net):
    return cache(lambda: copies.copy.deepcopy(net))


class Keeper:
    """Such as transformers' Trainer, with ``module=lambda: trainer.model``."""

    def __init__(self, net):
        self.rows = range(3)
        self.net = net

    def __call__(self):
        return self.net


def of_a_method(net):
    return Keeper(net).__call__


def of_a_module(net):
    global MODELS
    MODELS = ModuleType("models")
    MODELS.network = net
    return lambda: MODELS.network


def of_an_attribute(net):
    class Models:
        network = net

    global MODELS
    MODELS = Models
    return lambda: MODELS.network


def of_data(net):
    """The texts are before the network, and more than are looked at."""
    texts = [[f"{k}" for k in range(10)] for _ in range(copies.MOST // 10)]
    kept = SimpleNamespace(texts=texts, models=SimpleNamespace(network=net))
    return lambda: kept.models.network


def of_a_proxy(net):
    keeper, gone = Keeper(net), Keeper(net)
    held = [proxy(gone), keeper]
    del gone
    return lambda: held[1].net


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


FACTORIES = [
    of_a_lambda, of_a_part, of_a_cache, of_a_table, of_a_class, of_a_subclass, of_an_array,
    of_a_cached_function, Keeper, of_a_method, of_a_module, of_an_attribute, of_data, of_a_proxy,
]  # fmt: skip


@pytest.mark.parametrize("factory", FACTORIES)
def test_soups_of_a_factory_that_keeps_its_network_are_apart(zoo: Zoo, factory):
    """Once, the second soup was the first one, too."""
    states = dict(zoo.checkpoints)
    if factory is of_a_part:
        states = {n: {f"inner.{key}": w for key, w in s.items()} for n, s in states.items()}
    net = copies.copy.deepcopy(zoo.checkpoints.build_module())  # which no collection has built
    build = factory(net)
    kept = build() if factory is of_a_cached_function else net
    array = getattr(build, "array", np.zeros(0))
    before = {name: w.clone() for name, w in kept.state_dict().items()}, array.copy()
    collection = CheckpointCollection(states, module=build)
    soups = [UniformSoup(), BestCheckpoint(), UniformSoup()]
    with warnings.catch_warnings(action="ignore"):
        for soup in soups:
            soup.fit(collection, zoo.X, zoo.y)
    uniform, best, again = (soup.state_dict() for soup in soups)
    assert same_tensors(uniform, again)
    assert not same_tensors(uniform, best)
    assert same_tensors(uniform, mix(collection, np.full(len(states), 1 / len(states))))
    assert same_tensors(kept.state_dict(), before[0])
    np.testing.assert_array_equal(array, before[1])


def test_a_network_that_is_kept_elsewhere_is_known_from_the_second_time_on():
    """Also if the fit has moved its values, as it widens those of two bytes."""
    zoo = make_zoo(3, seed=0, batch_norm=False)  # whose counters are not moved
    elsewhere = ModuleType("elsewhere")
    elsewhere.net = copies.copy.deepcopy(zoo.checkpoints.build_module()).bfloat16()
    elsewhere.build = lambda: vars(elsewhere)["net"]
    collection = CheckpointCollection(dict(zoo.checkpoints), module=elsewhere.build)
    soups = [UniformSoup(), BestCheckpoint()]
    with warnings.catch_warnings(action="ignore"):
        for soup in soups:
            soup.fit(collection, zoo.X, zoo.y)
    uniform, best = (soup.state_dict() for soup in soups)
    assert not same_tensors(uniform, best)


def test_of_the_data_of_a_factory_only_some_are_looked_at():
    """Once, each network took a second if the object that builds it held 30,000 texts."""
    keeper = Keeper([[0] * 2000 for _ in range(2000)])
    items = []

    def held(value, held=copies._held):
        items.extend(found := held(value))
        return found

    with patch.object(copies, "_held", held):
        assert not copies.Original(nn.Linear(2, 2)).is_kept_by(keeper)
    assert len(items) < 2 * copies.MOST


def test_new_networks_are_not_copied(zoo: Zoo):
    with patch.object(copies, "copied", side_effect=AssertionError):
        first, second = (zoo.checkpoints.build_module() for _ in range(2))
        del first
        third = zoo.checkpoints.build_module()  # maybe at the place of the first one
    assert second is not third
