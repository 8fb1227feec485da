from __future__ import annotations

import numpy as np
import pytest
import torch

from sksoup import BestCheckpoint, CheckpointEnsemble, UniformSoup

from ..zoo import Zoo, same_tensors


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
