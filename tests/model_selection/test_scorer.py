"""Keeping the candidates of scikit-learn's searches."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from sklearn.model_selection import RandomizedSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from sksoup import GreedySoup
from sksoup.model_selection import CheckpointScorer

from ..zoo import PlainNet, Zoo
from .searches import LR, net_of, unrelated


def test_an_unmodified_random_search_keeps_every_candidate(tmp_path, zoo: Zoo):
    module = PlainNet()
    module.drop = nn.Identity()
    scorer = CheckpointScorer(tmp_path / "runs", scoring="accuracy")
    settings = {"n_iter": 3, "cv": 2, "random_state": 0}
    search = RandomizedSearchCV(net_of(module), LR, scoring=scorer, **settings)
    search.fit(zoo.X, zoo.y)
    collection = scorer.checkpoints(module=PlainNet)
    assert len(collection) == 6  # candidates times splits; the refitted best is not scored
    plain = RandomizedSearchCV(net_of(module), LR, scoring="accuracy", **settings)
    plain.fit(zoo.X, zoo.y)
    assert (search.cv_results_["mean_test_score"] == plain.cv_results_["mean_test_score"]).all()
    assert unrelated(collection) == []
    soup = GreedySoup().fit(collection, zoo.X, zoo.y)
    assert soup.score(zoo.X, zoo.y) >= max(soup.individual_scores_.values())
    net = net_of().fit(zoo.X, zoo.y)
    assert scorer(net, zoo.X, zoo.y) == scorer(net, zoo.X, zoo.y) == net.score(zoo.X, zoo.y)
    assert len(scorer.checkpoints(module=PlainNet)) == 7  # the same weights are one file


def test_the_scorer_finds_the_net_in_a_pipeline_and_refuses_others(tmp_path, zoo: Zoo):
    scorer = CheckpointScorer(tmp_path / "runs")
    pipe = make_pipeline(FunctionTransformer(), net_of()).fit(zoo.X, zoo.y)
    assert scorer(pipe, zoo.X, zoo.y) == pipe.score(zoo.X, zoo.y)
    with pytest.raises(TypeError, match="has no module_ to save"):
        scorer(FunctionTransformer(), zoo.X, zoo.y)
    (file,) = (tmp_path / "runs").iterdir()
    record = json.loads(safe_open(file, "pt").metadata()["sksoup.candidate"])
    assert record == {"score": pipe.score(zoo.X, zoo.y)}
