"""
Grid search over soups
======================

A soup is a scikit-learn estimator, so its parameters, and the collections it is made of, are
searched like any others. Here: how fast to learn the coefficients, one set for the whole network or
one per layer, and whether to leave the weakest checkpoints out.
"""

# %%
# A zoo of 24 digit networks, fine-tuned from one start, as files. Opening them reads headers only.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.model_selection import GridSearchCV

from sksoup import BestCheckpoint, MEHLSoup
from sksoup.datasets import make_digits_checkpoints

torch.set_num_threads(1)  # below, two workers use a core each
zoo = make_digits_checkpoints()
best = BestCheckpoint().fit(zoo.checkpoints, zoo.X_val, zoo.y_val)
print(best)

# %%
# ``checkpoints`` is a parameter like the others: a collection is never copied or sliced by the
# search, and a worker of ``n_jobs=2`` is sent paths, not weights.

ranked = sorted(best.individual_scores_, key=best.individual_scores_.get, reverse=True)
grid = {
    "checkpoints": [zoo.checkpoints, zoo.checkpoints.select(ranked[:8])],
    "layerwise": [False, True],
    "lr": [0.02, 0.1, 0.5],
}
search = GridSearchCV(
    MEHLSoup(model_batch_size=6, random_state=0), grid, scoring="neg_log_loss", cv=2, n_jobs=2
)
search.fit(zoo.X_val, zoo.y_val)

# %%
# Each fold learns coefficients on half of the held-out rows and is scored on the other half; the
# best setting is then fitted on all of them. The search never sees the test rows.

soup = search.best_estimator_
print(search.best_params_)
print(f"best checkpoint {best.score(zoo.X_test, zoo.y_test):.3f}")
print(f"searched soup   {soup.score(zoo.X_test, zoo.y_test):.3f}")

# %%
# The curves of the search: the held-out loss against the learning rate.

results = search.cv_results_
for n in (24, 8):
    for layerwise in (False, True):
        rows = [
            k
            for k, p in enumerate(results["params"])
            if (len(p["checkpoints"]), p["layerwise"]) == (n, layerwise)
        ]
        plt.plot(
            [results["params"][k]["lr"] for k in rows],
            -results["mean_test_score"][rows],
            marker="o",
            label=f"{n} checkpoints, {'per layer' if layerwise else 'one set'}",
        )
plt.xscale("log")
plt.xlabel("learning rate of the coefficients")
plt.ylabel("log loss (cross-validated)")
plt.legend()
plt.show()

# %%
# The result, checked: the searched soup beats the best checkpoint on rows neither has seen, and its
# coefficients sum to one in every layer.

if soup.score(zoo.X_test, zoo.y_test) <= best.score(zoo.X_test, zoo.y_test):
    raise RuntimeError("the searched soup should beat the best checkpoint")
np.testing.assert_allclose(np.atleast_2d(soup.coef_).sum(axis=1), 1)
