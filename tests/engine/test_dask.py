"""A real Dask cluster of two local worker processes: the same results as one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from joblib import effective_n_jobs, parallel_config
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, MEHLSoup
from sksoup.model_selection import SoupSearchCV

from ..zoo import PlainNet, make_zoo

# what the cluster says about this machine and about itself
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dask")
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", local_directory=str(folder)
        ) as workers,
        Client(workers) as client,
    ):
        client.run(torch.set_num_threads, 1)
        yield client


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_zoo(7, seed=3, batch_norm=False)


@pytest.fixture(scope="module")
def files(zoo, tmp_path_factory) -> CheckpointCollection:
    return zoo.checkpoints.save(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("soup", [BestCheckpoint(), GreedySoup(batch_size=20)])
def test_ranking_and_candidates(zoo, files, tmp_path, soup, memory, cluster):
    plain = clone(soup).fit(files, zoo.X, zoo.y)
    soup = clone(soup).set_params(n_jobs=-1, memory=tmp_path if memory else None)
    with parallel_config(backend="dask"):
        assert effective_n_jobs(-1) == 2
        soup.fit(files, zoo.X, zoo.y)
    assert soup.individual_scores_ == plain.individual_scores_
    assert getattr(soup, "path_", None) == getattr(plain, "path_", None)
    assert np.array_equal(soup.coef_, plain.coef_)
    if memory:  # the workers kept what they computed
        again = clone(soup).set_params(n_jobs=None).fit(files, zoo.X, zoo.y)
        assert again.counts_.rows_forward == 0
    assert cluster.run(torch.get_num_threads)  # alive


def test_grid_search(zoo, files):
    grid = {"layerwise": [False, True], "lr": [0.01, 0.05]}
    soup = MEHLSoup(files, model_batch_size=3, max_epochs=1, random_state=0)
    plain = GridSearchCV(soup, grid, cv=3).fit(zoo.X, zoo.y)
    with parallel_config(backend="dask"):
        search = GridSearchCV(soup, grid, cv=3, n_jobs=-1).fit(zoo.X, zoo.y)
    for split in range(3):
        column = f"split{split}_test_score"
        assert (search.cv_results_[column] == plain.cv_results_[column]).all()
    assert np.array_equal(search.best_estimator_.coef_, plain.best_estimator_.coef_)


def test_soup_search(zoo):
    net = NeuralNetClassifier(
        PlainNet(), criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0, train_split=None
    )
    search = SoupSearchCV(net, {"lr": loguniform(1e-3, 1e-1)}, n_iter=4, random_state=0)
    plain = clone(search).fit(zoo.X, zoo.y)
    with parallel_config(backend="dask"):
        found = clone(search).set_params(n_jobs=-1).fit(zoo.X, zoo.y)
    assert np.array_equal(found.soup_.coef_, plain.soup_.coef_)
    assert found.score(zoo.X, zoo.y) == plain.score(zoo.X, zoo.y)
