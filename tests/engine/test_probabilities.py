"""Modules that return probabilities are warned of, and losses of probabilities are refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    ModelStockSoup,
    PrunedSoup,
    SoupWarning,
    UniformSoup,
)
from sksoup.cli.wording import in_commands
from sksoup.engine.probabilities import Watch
from sksoup.inspection import loss_barrier

from ..zoo import Zoo, around

QUICK = {"max_epochs": 1, "random_state": 0}
SOUPS = [
    UniformSoup(), BestCheckpoint(), BestCheckpoint(scoring="neg_log_loss"), CheckpointEnsemble(),
    ModelStockSoup(start="checkpoint0"), GreedySoup(), PrunedSoup(), MEHLSoup(**QUICK),
    LearnedSoup(**QUICK),
]  # fmt: skip


def nets(last: nn.Module, n_outputs: int = 3, n: int = 3) -> CheckpointCollection:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CheckpointCollection(around(nn.Sequential(nn.Linear(4, n_outputs), last), n))


class Ends(nn.Module):
    """A function of the outputs of a layer."""

    def __init__(self, function, n_outputs: int = 3) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, n_outputs), function

    def forward(self, X):
        return self.function(self.layer(X))


def said(fit) -> list[str]:
    """The warnings that a module returns probabilities."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [str(one.message) for one in caught if "returns probabilities" in str(one.message)]


@pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)
def test_every_soup_warns_once(soup, zoo: Zoo):
    (message,) = said(lambda: soup.fit(nets(nn.Softmax(1)), zoo.X, zoo.y))
    assert message.startswith("The module ends in a softmax, so it returns probabilities")
    assert message.endswith("pass forward=lambda module, X: module(X).clamp_min(1e-12).log().")
    assert message in soup.warnings_


def test_one_logit(zoo: Zoo):
    """Whatever the labels, and where chance is not worse."""
    y = zoo.y > 0
    (message,) = said(lambda: UniformSoup().fit(nets(nn.Sigmoid(), 1), zoo.X, y))
    assert "every row would get the second label" in message
    assert "forward=lambda module, X: torch.logit(module(X), eps=1e-6)" in message
    of_one_of_two = Ends(lambda z: z.softmax(1)[:, 1], 2)
    (message,) = said(lambda: UniformSoup().fit(around(of_one_of_two, 2), zoo.X, y))
    assert "torch.logit" in message


def test_several_labels(zoo: Zoo):
    y = np.stack([zoo.y > 0, zoo.y > 1, zoo.y < 1], axis=1).astype(int)
    soup = UniformSoup(task="multilabel")
    (message,) = said(lambda: soup.fit(nets(nn.Sigmoid()), zoo.X, y))
    assert "every row would get every label" in message
    heads = Ends(lambda z: torch.cat([part.sigmoid() for part in z.split(1, dim=1)], dim=1))
    assert said(lambda: soup.fit(around(heads, 2), zoo.X, y))


@pytest.mark.parametrize(
    ("last", "remedy"),
    [
        (nn.Softmax(1), lambda module, X: module(X).clamp_min(1e-12).log()),
        (nn.Sigmoid(), lambda module, X: torch.logit(module(X), eps=1e-6)),
    ],
    ids=["softmax", "sigmoid"],
)
def test_the_remedy_gives_the_outputs_of_the_module_without_the_last_layer(last, remedy, zoo: Zoo):
    n_outputs, y = (3, zoo.y) if isinstance(last, nn.Softmax) else (1, zoo.y > 0)
    soup = MEHLSoup(forward=remedy, **QUICK).fit(nets(last, n_outputs), zoo.X, y)
    plain = MEHLSoup(**QUICK).fit(nets(nn.Identity(), n_outputs), zoo.X, y)
    np.testing.assert_allclose(soup.coef_, plain.coef_, atol=1e-4)
    np.testing.assert_allclose(soup.predict_proba(zoo.X), plain.predict_proba(zoo.X), atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.special.expit(z),
        lambda z: F.softmax(z, dim=1).clamp(1e-7, 1 - 1e-7),
        lambda z: z.unsqueeze(1).bfloat16().softmax(-1).float()[:, 0],
        lambda z: z.sigmoid_(),
        lambda z: (z, z.softmax(1))[1:],
        lambda z: z.exp() / z.exp().sum(1, keepdim=True),  # known by its sums only
    ],
)
def test_probabilities_are_found(function, zoo: Zoo):
    assert said(lambda: UniformSoup().fit(around(Ends(function), 2), zoo.X, zoo.y))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z,
        lambda z: z.log_softmax(1),
        lambda z: z.softmax(1).log_(),
        lambda z: F.logsigmoid(z),
        lambda z: z * z.sigmoid(),
        lambda z: z.sigmoid() / 3,  # in [0, 1], and not the result of a sigmoid
        lambda z: z.softmax(1) @ torch.eye(3) * 2 - 1,
        lambda z: torch.eye(3)[z.argmax(1)],  # sums to 1, but in whole numbers
        lambda z: torch.cat([z[:, :1].sigmoid(), z[:, 1:].clamp(0.1, 0.9)], dim=1),
        lambda z: 5 * (z - z.mean(1, keepdim=True)) + 1 / 3,  # sums to 1, and is not in [0, 1]
    ],
)
def test_other_outputs_are_not_warned_of(function, zoo: Zoo):
    assert not said(lambda: UniformSoup().fit(around(Ends(function), 2), zoo.X, zoo.y))


def test_one_logit_that_is_changed_in_place_is_no_probability(zoo: Zoo):
    module = Ends(lambda z: z.sigmoid().logit_().clamp_(0.1, 0.9), 1)
    assert not said(lambda: UniformSoup().fit(around(module, 2), zoo.X, zoo.y > 0))


def test_probabilities_are_the_targets_of_a_regression(zoo: Zoo):
    y = np.eye(3)[zoo.y]
    soup = MEHLSoup(task="regression", criterion=nn.BCELoss, **QUICK)
    assert not said(lambda: soup.fit(nets(nn.Sigmoid()), zoo.X, y))


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_pixels(n_outputs):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, 2, 5, 4)).astype(np.float32)
    y = rng.integers(max(2, n_outputs), size=(20, 5, 4))
    last = nn.Softmax(1) if n_outputs > 1 else nn.Sigmoid()
    net = nn.Sequential(nn.Conv2d(2, n_outputs, 1), last, nn.Upsample(scale_factor=1))
    assert said(lambda: UniformSoup().fit(around(net, 2), X, y))
    assert not said(lambda: UniformSoup().fit(around(net[:1], 2), X, y))


def test_the_command_line_has_no_forward(zoo: Zoo):
    (message,) = said(lambda: UniformSoup().fit(nets(nn.Softmax(1)), zoo.X, zoo.y))
    assert in_commands(message).endswith("would be wrong. Remove the softmax from the module.")


def test_nothing_is_kept():
    with Watch() as watch:
        found = nn.Softmax(1)(torch.randn(2, 3))
        assert watch.activation_of(found.view(3, 2)) == "softmax"
        del found
    assert not len(watch._found)


def test_a_barrier_is_warned_of_if_it_reads_logits(zoo: Zoo):
    args = nets(nn.Softmax(1), n=2), zoo.X, zoo.y
    with pytest.warns(SoupWarning, match="ends in a softmax") as caught:
        loss_barrier(*args)
    assert caught[0].filename == __file__
    assert not said(lambda: loss_barrier(*args, criterion=lambda p, y: F.nll_loss(p.log(), y)))


@pytest.mark.parametrize("criterion", [nn.BCELoss, nn.BCELoss(), F.binary_cross_entropy])
def test_losses_of_probabilities_are_refused(criterion, zoo: Zoo):
    for task, y in (("classification", zoo.y), ("multilabel", np.eye(3)[zoo.y])):
        soup = MEHLSoup(criterion=criterion, task=task)
        with pytest.raises(ValueError, match=r"soups need logits.*torch\.logit"):
            soup.fit(nets(nn.Identity()), zoo.X, y)


class Words(nn.Module):
    """A language model, whose outputs are in the last dimension."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, tokens):
        return (self.head(self.embed(tokens)) * 5).log_softmax(-1)


def test_a_language_model_of_log_probabilities_may_be_fitted_with_their_loss():
    models = CheckpointCollection(around(Words(), 2), module=Words)
    X = np.arange(60).reshape(5, 12) % 7
    soup = LearnedSoup(criterion=nn.NLLLoss(), task="causal-lm", **QUICK)
    assert np.isfinite(soup.fit(models, X, X).coef_).all()


def test_a_loss_of_log_probabilities_needs_them(zoo: Zoo):
    soup = LearnedSoup(criterion=nn.NLLLoss, **QUICK)
    for last in (nn.Softmax(1), nn.Identity()):
        with pytest.raises(ValueError, match=r"needs log-probabilities, .* sum to [1-9]\."):
            soup.fit(nets(last), zoo.X, zoo.y)
    soup.fit(nets(nn.LogSoftmax(1)), zoo.X, zoo.y)
    plain = LearnedSoup(**QUICK).fit(nets(nn.Identity()), zoo.X, zoo.y)
    np.testing.assert_allclose(soup.coef_, plain.coef_, atol=1e-2)
