"""
Fine-tune and soup in one estimator (skorch)
============================================

A random search trains many networks and throws all but one away.
`sksoup.model_selection.SoupSearchCV` keeps them: it fine-tunes clones of a skorch net from
one pretrained start, writes each as it finishes, and mixes them on the rows it held out.
"""

# %%
# Pretrain on clean digits; the task are shifted, noisy ones, of which there are few.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import shift
from scipy.stats import loguniform
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from torch import nn

from sksoup import MEHLSoup
from sksoup.datasets import DigitsConvNet
from sksoup.model_selection import SoupSearchCV

rng = np.random.default_rng(0)
X, y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
X_clean, X_task, y_clean, y_task = train_test_split(X, y, test_size=0.6, random_state=0)
moved = [shift(row.reshape(8, 8), rng.integers(-1, 2, 2)).ravel() for row in X_task]
X_task = (np.array(moved) + rng.normal(0, 0.2, X_task.shape)).astype("float32")
X_train, X_test, y_train, y_test = train_test_split(X_task, y_task, random_state=0)

torch.manual_seed(0)
net = NeuralNetClassifier(
    DigitsConvNet,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.AdamW,
    lr=0.003,
    max_epochs=10,
    batch_size=64,
    iterator_train__shuffle=True,
    train_split=None,
    verbose=0,
).fit(X_clean, y_clean)
print(f"pretrained: {net.score(X_test, y_test):.3f}")

# %%
# Sample hyper-parameters, fine-tune, soup. The fitted net is the start; were its module a class and
# the net not fitted, a warning would say that the start is random. A search that is killed goes on
# from the checkpoints in ``save_dir``.

folder = tempfile.TemporaryDirectory()
search = SoupSearchCV(
    net,
    {
        "lr": loguniform(5e-4, 8e-3),
        "optimizer__weight_decay": loguniform(1e-4, 1e-1),
        "max_epochs": [4, 6, 8],
    },
    soup=MEHLSoup(layerwise=True, model_batch_size=4, random_state=0),
    n_iter=12,
    random_state=0,
    save_dir=folder.name,
)
search.fit(X_train, y_train)
print(search.checkpoints_)
print(sorted(path.name for path in Path(folder.name).iterdir())[:3], "...")

# %%
# What the search would have given, and what the soup gives.

best = net.initialize()
best.module_.load_state_dict(search.checkpoints_[f"candidate{search.best_index_:03d}"])
print(f"best candidate: {best.score(X_test, y_test):.3f}")
print(f"soup:           {search.score(X_test, y_test):.3f}")

scores = search.cv_results_["mean_test_score"]
plt.scatter([p["lr"] for p in search.cv_results_["params"]], scores, label="candidates, held out")
plt.axhline(best.score(X_test, y_test), ls=":", label="best candidate, test")
plt.axhline(search.score(X_test, y_test), color="C1", label="soup, test")
plt.xscale("log")
plt.xlabel("learning rate")
plt.ylabel("accuracy")
plt.legend()
plt.show()

# %%
# A soup is a start, too: ``to_skorch`` gives a net with its weights, to train on.

more = search.soup_.to_skorch(verbose=0, train_split=None, lr=1e-3, max_epochs=1)
more.partial_fit(X_train, y_train)

# %%
# The result, checked: at the cost of one network, at least as good as the best candidate.

if search.score(X_test, y_test) < best.score(X_test, y_test):
    raise RuntimeError("the soup should not be worse than the best candidate")
folder.cleanup()
