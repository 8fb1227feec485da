"""
Grid search over soups
======================

A soup is a scikit-learn estimator, so its parameters can be searched like any others. This example
searches over the learning rate of the coefficients, one set for the network or one per layer, and
whether to leave out the weakest checkpoints.
"""

# %%
# 24 digit networks, fine-tuned from one start.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.model_selection import GridSearchCV

from sksoup import BestCheckpoint, MEHLSoup
from sksoup.datasets import make_digits_checkpoints

torch.set_num_threads(1)  # below, two workers use a core each
zoo = make_digits_checkpoints()
best = BestCheckpoint().fit(zoo.checkpoints, zoo.X_val, zoo.y_val)
print(f"best checkpoint {best.score(zoo.X_test, zoo.y_test):.3f}")

# %%
# ``checkpoints`` is a parameter too. The search neither copies nor slices a collection, and with
# ``n_jobs=2``, workers receive paths, not weights.

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
# In each fold, the coefficients are fitted on half of the validation data and scored on the other
# half. The best setting is then fitted on all of it. The test data is not used in the search.

soup = search.best_estimator_
print(search.best_params_)
print(f"best checkpoint {best.score(zoo.X_test, zoo.y_test):.3f}")
print(f"searched soup   {soup.score(zoo.X_test, zoo.y_test):.3f}")

# %%
# The cross-validated loss against the learning rate.

results = search.cv_results_
for n, style in ((24, "-"), (8, "--")):
    for layerwise, marker in ((False, "o"), (True, "D")):
        rows = [
            k
            for k, p in enumerate(results["params"])
            if (len(p["checkpoints"]), p["layerwise"]) == (n, layerwise)
        ]
        plt.plot(
            [results["params"][k]["lr"] for k in rows],
            -results["mean_test_score"][rows],
            marker + style,
            color="#0072b2" if n == 24 else "#d55e00",
            label=f"{n} checkpoints, {'per layer' if layerwise else 'one set'}",
        )
plt.xscale("log")
plt.xticks(grid["lr"], grid["lr"])
plt.minorticks_off()
plt.xlabel("learning rate of the coefficients")
plt.ylabel("log loss (cross-validated)")
plt.title("Cross-validated loss of the soup by learning rate")
plt.legend()
plt.show()

# %%
# A check: the soup is more accurate than the best checkpoint on the test data, and its coefficients
# sum to one in every layer.

if soup.score(zoo.X_test, zoo.y_test) <= best.score(zoo.X_test, zoo.y_test):
    raise RuntimeError("the searched soup should beat the best checkpoint")
np.testing.assert_allclose(np.atleast_2d(soup.coef_).sum(axis=1), 1)
