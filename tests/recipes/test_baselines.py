from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    Recipe,
    UniformSoup,
)

from ..zoo import Net, Zoo, make_states, same_tensors


def test_uniform_is_the_mean(zoo64: Zoo):
    soup = UniformSoup().fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    states = list(zoo64.checkpoints.values())
    for name, value in soup.state_dict().items():
        torch.testing.assert_close(value, sum(s[name] for s in states) / 5, atol=1e-14, rtol=0)


def test_best_is_the_first_with_the_highest_score(zoo: Zoo):
    best = BestCheckpoint().fit(zoo.checkpoints, zoo.X, zoo.y)
    scores = best.individual_scores_
    expected = next(name for name in scores if scores[name] == max(scores.values()))
    assert best.ingredients_ == (expected,)
    assert same_tensors(best.state_dict(), zoo.checkpoints[expected])
    assert best.score(zoo.X, zoo.y) == scores[expected]


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_network_of_nan_is_right_nowhere(zoo: Zoo, task):
    class Overflowing(Net):
        def forward(self, x):
            return super().forward(x) + torch.where(self.head.bias > 1e6, torch.nan, 0.0)

    states = make_states(3, seed=0)
    states[1]["head.bias"] = torch.full_like(states[1]["head.bias"], 1e9)
    y = np.zeros(len(zoo.X), int)  # what argmax and > 0 make of NaN
    y = np.stack([y, y, y], axis=1) if task == "multilabel" else y
    best = BestCheckpoint(task=task, classes=None if task == "multilabel" else [0, 1, 2])
    best.fit(CheckpointCollection(states, module=Overflowing), zoo.X, y)
    assert best.individual_scores_["checkpoint1"] == 0
    assert best.ingredients_ != ("checkpoint1",)


def test_a_score_of_minus_infinity_is_not_recorded(zoo: Zoo, tmp_path: Path):
    X = torch.linspace(-1, 1, 40)[:, None].numpy()
    nets = [torch.nn.Linear(1, 1) for _ in range(3)]
    for net, slope in zip(nets, [1.0, 1e20, 1.1], strict=True):
        torch.nn.init.constant_(net.weight, slope)
        torch.nn.init.zeros_(net.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow in scikit-learn's r2_score
        best = BestCheckpoint(task="regression").fit(CheckpointCollection(nets), X, X[:, 0])
    assert best.individual_scores_["checkpoint1"] == -np.inf
    assert set(best.recipe_.scores) == {"checkpoint0", "checkpoint2"}
    best.save(tmp_path / "best.safetensors")
    assert Recipe.load(tmp_path / "best.safetensors") == best.recipe_


def test_ensemble_averages_logits(zoo: Zoo):
    ensemble = CheckpointEnsemble(batch_size=13).fit(zoo.checkpoints, zoo.X, zoo.y)
    logits = []
    for state in zoo.checkpoints.values():
        module = zoo.checkpoints.build_module().eval()
        module.load_state_dict(state)
        with torch.no_grad():
            logits.append(module(torch.as_tensor(zoo.X)))
    mean = torch.stack(logits).mean(0)
    np.testing.assert_allclose(ensemble.predict_proba(zoo.X), mean.softmax(1).numpy(), atol=1e-6)
    assert (ensemble.predict(zoo.X) == mean.argmax(1).numpy()).all()


@pytest.mark.parametrize("name", ["state_dict", "module_", "save", "save_adapter", "recipe_"])
def test_ensemble_has_no_weights(zoo: Zoo, name):
    ensemble = CheckpointEnsemble().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert not hasattr(ensemble, name)


def test_ensemble_says_what_to_do_instead(zoo: Zoo):
    with pytest.raises(AttributeError, match="fit a UniformSoup"):
        CheckpointEnsemble().fit(zoo.checkpoints, zoo.X, zoo.y).state_dict()
