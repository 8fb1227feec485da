"""Modules that do more than compute when they are switched, loaded and called."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sksoup import CheckpointCollection, GreedySoup, LearnedSoup, MEHLSoup, UniformSoup

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3


class Merged(nn.Linear):
    """Like lora.Linear of loralib: eval() adds the factors to the weights, train() undoes it."""

    def __init__(self, merge_weights: bool = True) -> None:
        super().__init__(4, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))
        self.merge_weights, self.merged = merge_weights, False

    def train(self, mode: bool = True) -> Merged:
        super().train(mode)
        if self.merge_weights and self.merged == mode:
            self.weight.data += (self.up @ self.down).data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        base = F.linear(x, self.weight, self.bias)
        return base if self.merged else base + x @ self.down.T @ self.up.T


class Fused(nn.Module):
    """Like RepVGG: each eval() makes one weight of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fused = nn.Linear(4, 3), nn.Linear(4, 3), None

    def train(self, mode: bool = True) -> None:  # returns nothing, as some do by mistake
        super().train(mode)
        self.fused = None if mode else (self.a.weight + self.b.weight).detach()

    def forward(self, x):
        return self.a(x) + self.b(x) if self.fused is None else x @ self.fused.T


class Remembering(nn.Module):
    """Keeps what it computed from its weights in eval mode, until train() is called."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.kept = nn.Linear(4, 3), None

    def train(self, mode: bool = True) -> Remembering:
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.classes(x)
        self.kept = self.classes.weight.detach().clone() if self.kept is None else self.kept
        return x @ self.kept.T


class Frozen(nn.Module):
    """A train() that keeps a part in eval mode and returns nothing; dropout, and noise in eval."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.noise, self.n_calls = noise, 0

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.norm.eval()

    def forward(self, x):
        self.n_calls += 1
        return self.head(self.drop(self.norm(x))) + self.noise * self.n_calls


def collection(build) -> CheckpointCollection:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        state = build().state_dict()
        states.append({n: v + torch.rand(v.shape) if v.is_floating_point() else v
                       for n, v in state.items()})  # fmt: skip
    return CheckpointCollection(states, module=build)


@pytest.mark.parametrize("soup", [UniformSoup(), GreedySoup(), MEHLSoup(max_epochs=1)])
@pytest.mark.parametrize("build", [Merged, Fused, Remembering])
def test_modules_that_merge_weights_in_eval_are_refused(build, soup):
    named = rf"caches weights \(in {build.__name__}\).*merge_weights=False"
    with pytest.raises(ValueError, match=named):
        soup.fit(collection(build), X, Y)


@pytest.mark.parametrize("after", [nn.LayerNorm(3), nn.Softmax(-1)])
def test_a_layer_that_merges_is_found_before_one_that_hides_sizes(after):
    def build():
        return nn.Sequential(Merged(), after, nn.Linear(3, 3))

    with pytest.raises(ValueError, match=r"in Merged \('0'\)"):
        UniformSoup().fit(collection(build), X, Y)


def test_the_part_that_merges_is_named():
    def build():
        return nn.Sequential(nn.Linear(4, 4), Fused())

    with pytest.raises(ValueError, match=r"in Fused \('1'\)"):
        UniformSoup().fit(collection(build), X, Y)


@pytest.mark.parametrize(
    "build", [lambda: Merged(merge_weights=False), Frozen, lambda: Frozen(noise=1.0)]
)
def test_modules_that_only_switch_otherwise_are_scored_as_by_load_state_dict(build):
    nets = collection(build)
    scores = GreedySoup().fit(nets, X, Y).individual_scores_
    for name in nets:
        net = build()
        net.load_state_dict(nets[name])
        net.eval()
        assert scores[name] == pytest.approx(float((net(X).argmax(1) == Y).float().mean()))


class Lazy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LazyLinear(3))


class NoGradient(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class OfTheBatch(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))


def test_a_lazy_module_is_named():
    state = nn.Sequential(nn.Linear(4, 3)).state_dict()
    with pytest.raises(ValueError, match=r"no shape for '0\.weight' yet \(Lazy has lazy layers\)"):
        UniformSoup().fit(CheckpointCollection([state, state], module=Lazy), X, Y)


@pytest.mark.parametrize("soup", [MEHLSoup(max_epochs=1), LearnedSoup(max_epochs=1)])
def test_outputs_without_a_gradient_can_not_be_learned_from(soup):
    with pytest.raises(ValueError, match=r"outputs of NoGradient have no gradient.*GreedySoup"):
        soup.fit(collection(NoGradient), X, Y)
    assert GreedySoup().fit(collection(NoGradient), X, Y).coef_.sum() == pytest.approx(1)


def test_a_module_that_needs_a_batch_is_refused_by_what_it_raised():
    with pytest.raises(ValueError, match=r"does not accept X: with one row.*more than 1 value per"):
        UniformSoup().fit(collection(OfTheBatch), X, Y)


def test_a_regression_on_strings_is_refused():
    build = partial(nn.Linear, 4, 1)
    with pytest.raises(
        ValueError, match=r"y holds .*'0.5'.*expected numbers for task='regression'"
    ):
        UniformSoup(task="regression").fit(collection(build), X, ["0.5"] * len(X))
