"""Which iterate MEHL-Soup keeps, and what each step records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV
from torch import nn

from sksoup import (
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    MEHLSoup,
    mix,
)
from sksoup.inspection import loss_barrier

from ..zoo import Net, PaperLearned, PaperMEHL, Zoo


def test_rows_set_aside_choose_the_epoch(zoo: Zoo):
    shared = {
        "model_batch_size": None, "batch_size": None, "schedule": "constant", "lr": 0.3,
        "validation_fraction": 0.25, "random_state": 0,
    }  # fmt: skip
    soup = PaperMEHL(max_epochs=12, **shared).fit(zoo.checkpoints, zoo.X, zoo.y)
    losses = [record["validation_loss"] for record in soup.history_]
    best = int(np.argmin(losses))
    assert best < 11  # the last is not the best here, so something was chosen
    until = PaperMEHL(max_epochs=best + 1, **shared).fit(zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_array_equal(soup.coef_, until.coef_)
    n_fit = len(zoo.y) - round(0.25 * len(zoo.y))
    assert soup.counts_.rows_backward == 12 * n_fit
    assert soup.counts_.rows_forward == 12 * n_fit + 13 * (len(zoo.y) - n_fit)


def test_when_every_epoch_is_worse_the_start_is_kept(zoo: Zoo):
    soup = PaperMEHL(
        model_batch_size=2, optimizer="sgd", lr=1e4, schedule="constant", max_epochs=2,
        validation_fraction=0.3, random_state=0,
    ).fit(zoo.checkpoints, zoo.X, zoo.y)  # fmt: skip
    first = [record["validation_loss"] for record in soup.history_ if record["outer"] == 0]
    assert min(first) > 1
    np.testing.assert_allclose(soup.coef_, 1 / len(zoo.checkpoints), rtol=0, atol=1e-12)


def test_weight_decay_pulls_towards_the_center(zoo: Zoo):
    def distance(weight_decay: float) -> float:
        soup = PaperMEHL(
            model_batch_size=None, lr=0.05, weight_decay=weight_decay, max_epochs=20, random_state=0
        ).fit(zoo.checkpoints, zoo.X, zoo.y)  # fmt: skip
        return float(np.abs(soup.coef_ - 1 / len(zoo.checkpoints)).sum())

    free, pulled, held = distance(0.0), distance(1.0), distance(10.0)
    assert free > 1.2 * pulled > 1.2 * 1.2 * held


@pytest.mark.parametrize("soup", [PaperMEHL, PaperLearned])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_score_of_a_step_is_that_of_the_soup_at_the_time(zoo: Zoo, soup, weighted):
    weight = np.linspace(0.1, 2, len(zoo.y)) if weighted else None
    fitted = soup(batch_size=None, max_epochs=1, random_state=0).fit(
        zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight
    )
    n = len(zoo.checkpoints)
    mean = zoo.checkpoints.build_module().eval()
    mean.load_state_dict(mix(zoo.checkpoints, np.full(n, 1 / n)), strict=False)
    predicted = mean(torch.as_tensor(zoo.X, dtype=torch.float32)).argmax(dim=1).numpy()
    expected = accuracy_score(zoo.y, predicted, sample_weight=weight)
    assert fitted.history_[0]["score"] == [pytest.approx(expected)]


def test_accumulated_steps_score_all_their_rows(zoo: Zoo):
    def scores(**how) -> list[float]:
        soup = PaperMEHL(max_epochs=1, shuffle=False, random_state=0, **how)
        return soup.fit(zoo.checkpoints, zoo.X, zoo.y).history_[0]["score"]

    assert scores(batch_size=20, accumulate=3) == pytest.approx(scores(batch_size=None))


def test_scores_of_other_tasks():
    torch.manual_seed(0)
    nets = [nn.Linear(3, 2) for _ in range(3)]
    X = torch.randn(30, 3)
    settings = {"batch_size": None, "max_epochs": 1, "random_state": 0}
    mean = nn.Linear(3, 2)
    mean.load_state_dict(mix(CheckpointCollection(nets), [1 / 3] * 3))
    targets = (torch.randn(30, 2) > 0).float()
    soup = PaperMEHL(CheckpointCollection(nets), task="multilabel", **settings).fit(X, targets)
    right = ((mean(X) > 0) == (targets > 0)).all(dim=1).float().mean()
    assert soup.history_[0]["score"] == [pytest.approx(float(right))]
    soup = PaperMEHL(CheckpointCollection(nets), task="regression", **settings).fit(X, targets)
    assert "score" not in soup.history_[0]

    class Tokens(nn.Module):  # (n, 4) numbers -> (n, 2, 4) logits
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 2)

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            return self.head(X[..., None]).transpose(1, 2)

    tokens = [Tokens() for _ in range(3)]
    X, y = torch.randn(20, 4), torch.randint(2, (20, 4))
    y[:, 3] = -100
    soup = PaperMEHL(CheckpointCollection(tokens), **settings).fit(X, y)
    net = Tokens()
    net.load_state_dict(mix(CheckpointCollection(tokens), [1 / 3] * 3))
    hits = (net(X).argmax(dim=1) == y)[:, :3].float().mean()
    assert soup.history_[0]["score"] == [pytest.approx(float(hits))]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"weight_decay": -1}, "weight_decay"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": 0.0}, "validation_fraction"),
    ],
)
def test_bad_options(zoo: Zoo, kwargs, match):
    with pytest.raises(ValueError, match=match):
        PaperMEHL(**kwargs).fit(zoo.checkpoints, zoo.X, zoo.y)


@pytest.mark.parametrize("soup", [
    PaperMEHL(validation_fraction=0.1, max_epochs=1), GreedySoup(ranking_fraction=0.1),
])  # fmt: skip
def test_parts_smaller_than_the_number_of_labels(zoo: Zoo, soup):
    rows = np.arange(20)
    clone(soup).fit(zoo.checkpoints, zoo.X[rows], zoo.y[rows])  # two rows drawn, three labels


@pytest.mark.parametrize("soup", [
    PaperMEHL(validation_fraction=0.5, max_epochs=1, random_state=0),
    GreedySoup(ranking_fraction=0.5, random_state=0),
])  # fmt: skip
def test_parts_without_weight_are_refused(zoo: Zoo, soup):
    weight = np.zeros(60)
    weight[0] = 1.0
    with pytest.raises(ValueError, match="All 30 rows drawn, or all 30 others"):
        clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight)


def test_numbers_of_numpy_are_numbers(zoo: Zoo):
    soup = PaperMEHL(model_batch_size=2, max_epochs=2, batch_size=30, random_state=3)
    expected = clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y).coef_
    names = ("model_batch_size", "max_epochs", "batch_size", "random_state", "prefetch")
    soup.set_params(**{name: np.int64(getattr(soup, name)) for name in names})
    soup.set_params(lr=np.float32(0.05), weight_decay=np.float64(0))
    found = soup.fit(zoo.checkpoints, zoo.X, zoo.y).coef_
    np.testing.assert_allclose(found, expected, atol=1e-6)
    soup = PaperMEHL(zoo.checkpoints, random_state=0)
    search = GridSearchCV(soup, {"max_epochs": np.arange(1, 3)}, cv=2).fit(zoo.X, zoo.y)
    assert search.best_params_["max_epochs"] in (1, 2)


def test_rows_drawn_without_a_seed_leave_the_state_of_numpy(zoo: Zoo):
    state = np.random.get_state()[1].copy()
    drawn = []
    for _ in range(2):
        soup = GreedySoup(ranking_fraction=0.5).fit(zoo.checkpoints, zoo.X, zoo.y)
        drawn.append(tuple(soup.individual_scores_.values()))
        loss_barrier(zoo.checkpoints, zoo.X, zoo.y, n_points=2, n_pairs=1, random_state=None)
    assert np.array_equal(np.random.get_state()[1], state)
    assert drawn[0] != drawn[1]  # of 60 rows, twice


def test_a_ranking_looks_for_nan_first(zoo: Zoo):
    states = [dict(zoo.checkpoints[name]) for name in zoo.checkpoints]
    states[3]["head.weight"] = torch.full_like(states[3]["head.weight"], torch.nan)
    checkpoints = CheckpointCollection(states, module=Unrun)
    with pytest.raises(CheckpointError, match="holds NaN"):
        MEHLSoup(center="best", max_epochs=1).fit(checkpoints, zoo.X, zoo.y)


class Unrun(Net):
    """One row is fed to it, which tells the shape of its output."""

    def forward(self, x):
        assert len(x) == 1
        return super().forward(x)
