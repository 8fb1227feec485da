"""What networks are made of beside plain layers: norms, parametrisations, ties, frozen parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from sklearn.base import clone
from torch import nn
from torch.nn.utils import parametrizations

from sksoup import CheckpointCollection, GreedySoup, ModelStockSoup, UniformSoup, mix

from ..zoo import PaperLearned, PaperMEHL, Zoo, around, same_tensors

SOUPS = [
    UniformSoup(),
    GreedySoup(),
    PaperLearned(max_epochs=2, random_state=0),
    PaperMEHL(layerwise=True, model_batch_size=2, max_epochs=2, random_state=0),
]


class Group(nn.Module):
    """GroupNorm, LayerNorm, and a buffer that is not in the state dict."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.group, self.layer = nn.GroupNorm(2, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((6,), 2.0), persistent=False)

    def forward(self, X):
        return self.head(self.layer(self.group(self.first(X)).relu() * self.scale))


class Weighted(nn.Module):
    """Weight norm (direction and length are mixed, not their product) and spectral norm."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(4, 6))
        self.second = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, X):
        return self.head(self.second(self.first(X).tanh()).tanh())


class Padded(nn.Module):
    """An embedding with a padding row that stays zero, tied to nothing; integers in."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=0)
        self.head = nn.Linear(6, 3)

    def forward(self, X):
        return self.head(self.words(X).mean(dim=1))


class Tied(nn.Module):
    """A head that is the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 6)
        self.first = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight = self.words.weight

    def forward(self, X):
        return self.head(self.first(X).tanh())


class Registers(nn.Module):
    """No register tokens, as is the default of DINOv3, and a train() of its own."""

    def __init__(self):
        super().__init__()
        self.registers = nn.Parameter(torch.zeros(1, 0, 6))
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, X):
        tokens = torch.cat([self.registers.expand(len(X), -1, -1), self.first(X)[:, None]], dim=1)
        return self.head(self.norm(tokens.mean(dim=1)).relu())


class Frozen(nn.Module):
    """A backbone that never trained: the same in all checkpoints, and without gradients."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, X):
        return self.head(self.backbone(X).relu())


def modules_of(kind):
    torch.manual_seed(0)
    start = kind()
    if kind is Frozen:
        modules = [kind() for _ in range(4)]
        for module in modules:
            module.backbone.load_state_dict(start.backbone.state_dict())
        return modules
    modules = around(start, 4, 0.2)
    if kind is Padded:
        for module in modules:
            module.words.weight.data[0] = 0
    return modules


@pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)
@pytest.mark.parametrize("kind", [Group, Weighted, Padded, Tied, Registers, Frozen])
def test_soups_of(kind, soup, zoo: Zoo):
    modules = modules_of(kind)
    X = np.abs(zoo.X * 3).astype(int) % 7 if kind is Padded else zoo.X
    checkpoints = CheckpointCollection(modules)
    soup = clone(soup).fit(checkpoints, X, zoo.y)
    assert same_tensors(soup.state_dict(), mix(checkpoints, soup.coef_, layers=soup.layers_))
    again = kind().eval()
    again.load_state_dict(soup.state_dict())
    with torch.no_grad():
        expected = again(torch.as_tensor(X)).numpy()
        got = soup.module_(torch.as_tensor(X)).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)
    module = soup.module_
    if kind is Padded:
        assert not module.words.weight[0].any()
    if kind is Tied:
        assert module.head.weight is module.words.weight
    if kind is Group:
        assert (module.scale == 2).all()
    if kind is Frozen:
        assert same_tensors(
            dict(module.backbone.state_dict()), dict(modules[0].backbone.state_dict())
        )


@pytest.mark.parametrize(
    "soup", [*SOUPS[2:], ModelStockSoup(start="start")], ids=lambda soup: type(soup).__name__
)
def test_coefficients_do_not_depend_on_the_name_that_stores_a_tied_tensor(soup, zoo: Zoo):
    torch.manual_seed(0)
    start = Tied()
    moved = around(start, 1, spread=0.3)[0]
    nets = [*around(moved, 3, spread=0.1), start]
    names = ["a", "b", "c", "start"]
    fitted = []
    for left_out in ("words.weight", "head.weight"):
        states = [
            {name: value for name, value in net.state_dict().items() if name != left_out}
            for net in nets
        ]
        collection = CheckpointCollection(states, names=names, module=Tied)
        fitted.append(clone(soup).fit(collection, zoo.X, zoo.y))
    by_head, by_words = (one.module_.state_dict() for one in fitted)
    assert all(torch.allclose(by_head[name], by_words[name], atol=1e-6) for name in by_words)
    assert not torch.equal(by_head["head.weight"].cpu(), start.head.weight)


def test_gradients_pass_through_parametrisations(zoo: Zoo):
    """The loss falls: coefficients of what a parametrisation is made of are learned."""
    checkpoints = CheckpointCollection(modules_of(Weighted))
    soup = PaperMEHL(model_batch_size=None, max_epochs=10, random_state=0)
    soup.fit(checkpoints, zoo.X, zoo.y)
    assert soup.history_[-1]["loss"][-1] < soup.history_[0]["loss"][0]


def test_dropout_is_off_during_the_search(zoo: Zoo):
    class Dropped(nn.Module):
        def __init__(self, p=0.9):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.Dropout(p), nn.Linear(6, 3))

        def forward(self, X):
            return self.layers(X)

    states = [module.state_dict() for module in around(Dropped(), 3, 0.2)]
    soup = PaperMEHL(max_epochs=2, random_state=0)
    dropped = clone(soup).fit(CheckpointCollection(states, module=Dropped), zoo.X, zoo.y)
    plain = clone(soup).fit(CheckpointCollection(states, module=lambda: Dropped(0.0)), zoo.X, zoo.y)
    assert np.array_equal(dropped.coef_, plain.coef_)


def test_a_soup_can_be_exported(zoo: Zoo):
    soup = UniformSoup().fit(CheckpointCollection(modules_of(Group)), zoo.X, zoo.y)
    X = torch.as_tensor(zoo.X)
    program = torch.export.export(soup.module_, (X,))
    torch.testing.assert_close(program.module()(X), soup.module_(X))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, while exporting
def test_a_soup_goes_to_onnx(zoo: Zoo):
    soup = UniformSoup().fit(CheckpointCollection(modules_of(Group)), zoo.X, zoo.y)
    program = torch.onnx.export(soup.module_, (torch.as_tensor(zoo.X),), verbose=False)
    model = program.model_proto
    (got,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: zoo.X})
    with torch.no_grad():
        expected = soup.module_(torch.as_tensor(zoo.X)).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


class ExtraState(nn.Linear):
    """Keeps a tensor that is no buffer."""

    def __init__(self):
        super().__init__(4, 3)
        self.mean = torch.zeros(4)

    def get_extra_state(self):
        return self.mean.clone()

    def set_extra_state(self, state):
        self.mean = state


class Copies(nn.Linear):
    """Writes copies of its weights, as layers with packed ones do."""

    def __init__(self):
        super().__init__(4, 3)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({n: w.clone() for n, w in state.items()})
        )


class SharedMemory(nn.Module):
    """Two parameters, one memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight.data = self.first.weight.data
        self.head = nn.Linear(4, 3)

    def forward(self, X):
        return self.head(self.second(self.first(X).relu()))


@pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (ExtraState, "'_extra_state' in the state_dict.. of ExtraState is neither a parameter nor"),
        (Copies, "'weight' in the state_dict.. of Copies is neither a parameter nor a buffer"),
        (SharedMemory, "'first.weight' and 'second.weight' are two parameters with the same mem"),
    ],
)
def test_modules_that_could_not_hold_the_soup_are_refused(soup, kind, match):
    """Once, other values than those that were scored were saved, or other ones scored."""
    states = [kind().state_dict() for _ in range(3)]
    with pytest.raises(ValueError, match=match):
        clone(soup).fit(CheckpointCollection(states, module=kind), torch.randn(9, 4), [0, 1, 2] * 3)


@pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_fit_where_gradients_are_off(zoo: Zoo, soup, off):
    """As in Lightning's validation hooks."""
    expected = clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y)
    with off():
        found = clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y)
        assert not torch.is_grad_enabled()
    assert np.array_equal(found.coef_, expected.coef_)
    assert not any(value.is_inference() for value in found.module_.state_dict().values())
