from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, make_scorer

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, mix
from sksoup._objective import load_weights
from sksoup.greedy import greedy, uniform_coef

from .references import greedy_reference
from .zoo import Net, Zoo, make_states, make_zoo


def accuracy_of(checkpoints, X, y, subset):
    """Accuracy of the mean of a subset, by a module of its own."""
    import torch

    module = checkpoints.build_module().eval()
    load_weights(module, mix(checkpoints, uniform_coef(subset, len(checkpoints))))
    with torch.no_grad():
        return accuracy_score(y, module(torch.as_tensor(X)).argmax(1).numpy())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 999))
def test_search_equals_recipe_1(scores, seed):
    """For any scores of single checkpoints and any scores of their means, ties included."""
    rng = np.random.default_rng(seed)
    table: dict[tuple[int, ...], float] = {}

    def score_of(subset):
        key = tuple(sorted(subset))
        if len(key) == 1:
            return scores[key[0]]
        return table.setdefault(key, float(rng.integers(0, 4)) / 4)

    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    ingredients, path = greedy(order, score_of, 0.0)
    assert ingredients == greedy_reference(scores, score_of)
    assert [tried["candidate"] for tried in path] == order


@settings(max_examples=15)
@given(n=st.integers(1, 7), seed=st.integers(0, 999))
def test_estimator_equals_the_obvious_implementation(n, seed):
    zoo = make_zoo(n, seed)
    soup = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)

    def score_of(subset):
        return accuracy_of(zoo.checkpoints, zoo.X, zoo.y, subset)

    scores = [score_of([k]) for k in range(n)]
    kept = greedy_reference(scores, score_of)
    assert soup.ingredients_ == tuple(zoo.checkpoints.names[k] for k in kept)
    assert list(soup.individual_scores_.values()) == scores
    assert soup.score(zoo.X, zoo.y) == score_of(kept) >= max(scores)
    assert soup.path_[-1]["candidate"] in zoo.checkpoints.names
    assert soup.counts_.rows_forward == (2 * n - 1) * len(zoo.X)


def test_known_scores_save_the_ranking(zoo: Zoo):
    ranked = BestCheckpoint().fit(zoo.checkpoints, zoo.X, zoo.y).individual_scores_
    known = CheckpointCollection(
        {name: zoo.checkpoints[name] for name in zoo.checkpoints}, module=Net, scores=ranked
    )
    soup = GreedySoup().fit(known, zoo.X, zoo.y)
    plain = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.ingredients_ == plain.ingredients_
    assert soup.counts_.rows_forward == len(zoo.checkpoints) * len(zoo.X)
    best = BestCheckpoint().fit(known, zoo.X, zoo.y)
    assert best.counts_.rows_forward == 0
    assert best.ingredients_ == soup.ingredients_[:1]


@pytest.mark.parametrize(
    "scoring",
    [
        "neg_log_loss",
        "balanced_accuracy",
        make_scorer(log_loss, greater_is_better=False, response_method="predict_proba"),
        lambda soup, X, y: -log_loss(y, soup.predict_proba(X)),
    ],
)
def test_any_scoring_with_lower_is_better_handled_by_the_scorer(zoo: Zoo, scoring):
    soup = GreedySoup(scoring=scoring).fit(zoo.checkpoints, zoo.X, zoo.y)
    best = BestCheckpoint(scoring=scoring).fit(zoo.checkpoints, zoo.X, zoo.y)
    kept = [tried["score"] for tried in soup.path_ if tried["kept"]]
    assert kept == sorted(kept)
    assert kept[0] == max(best.individual_scores_.values())


@pytest.mark.parametrize(("min_improvement", "kept"), [(0.0, 4), (0.001, 1)])
def test_ties_are_kept_unless_an_improvement_is_asked_for(min_improvement, kept):
    zoo = make_zoo(1, seed=0)
    same = CheckpointCollection(make_states(1, seed=0) * 4, module=Net)
    soup = GreedySoup(min_improvement=min_improvement).fit(same, zoo.X, zoo.y)
    assert len(soup.ingredients_) == kept


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ("much", TypeError)])
def test_bad_min_improvement(zoo: Zoo, value, error):
    with pytest.raises(error, match="min_improvement"):
        GreedySoup(min_improvement=value).fit(zoo.checkpoints, zoo.X, zoo.y)
