"""
On a Dask cluster
=================

Runs Greedy-Soup and a grid search on the workers of a Dask cluster, here two processes on one
machine::

    python examples/fit_on_dask.py
"""

import torch
from distributed import Client, LocalCluster
from joblib import parallel_config
from sklearn.model_selection import GridSearchCV

from sksoup import GreedySoup, MEHLSoup
from sksoup.datasets import make_digits_checkpoints


def main():
    """Fit on the cluster, and compare with this process."""
    torch.set_num_threads(1)
    digits = make_digits_checkpoints()
    checkpoints, X, y = digits.checkpoints, digits.X_val, digits.y_val
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
        parallel_config(backend="dask"),
    ):
        greedy = GreedySoup(n_jobs=-1).fit(checkpoints, X, y)
        search = GridSearchCV(
            MEHLSoup(checkpoints, model_batch_size=6, max_epochs=1, random_state=0),
            {"layerwise": [False, True]},
            cv=2,
            n_jobs=-1,
        ).fit(X, y)
    alone = GreedySoup().fit(checkpoints, X, y)
    print(f"same scores: {greedy.individual_scores_ == alone.individual_scores_}")
    print(f"same soup: {greedy.ingredients_ == alone.ingredients_}")
    print(f"best of the search: {search.best_params_}")


if __name__ == "__main__":
    main()
