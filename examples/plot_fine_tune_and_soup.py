"""
Fine-tune and mix in one estimator (skorch)
===========================================

A random search trains many networks and keeps only the best one.
`sksoup.model_selection.SoupSearchCV` fine-tunes a skorch net several times from one pretrained
start, saves every candidate, and mixes them using part of the data as validation data.
"""

# %%
# The net is pretrained on clean digits. The task is to classify shifted, noisy digits, of which
# there are only a few.

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
# Sample hyperparameters, fine-tune and mix. The fitted net is the start. (If the net were not
# fitted, the start would be random, with a warning.) An interrupted search resumes from the
# checkpoints in ``save_dir``.

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
# The best candidate, which a random search would return, and the soup.

best = net.initialize()
best.module_.load_state_dict(search.checkpoints_[f"candidate{search.best_index_:03d}"])
print(f"best candidate: {best.score(X_test, y_test):.3f}")
print(f"soup:           {search.score(X_test, y_test):.3f}")

scores = search.cv_results_["mean_test_score"]
plt.scatter([p["lr"] for p in search.cv_results_["params"]], scores, label="candidates, validation")
plt.axhline(best.score(X_test, y_test), color="C2", ls=":", label="best candidate, test")
plt.axhline(search.score(X_test, y_test), color="C1", label="soup, test")
plt.xscale("log")
plt.xticks([5e-4, 1e-3, 2e-3, 5e-3], ["0.0005", "0.001", "0.002", "0.005"])
plt.minorticks_off()
plt.xlabel("learning rate")
plt.ylabel("accuracy")
plt.title("Accuracy of candidates by learning rate, and of their soup")
plt.legend()
plt.show()

# %%
# ``to_skorch`` returns a net with the weights of the soup, which can be trained further.

more = search.soup_.to_skorch(verbose=0, train_split=None, lr=1e-3, max_epochs=1)
more.partial_fit(X_train, y_train)

# %%
# A check: the soup is at least as accurate as the best candidate.

if search.score(X_test, y_test) < best.score(X_test, y_test):
    raise RuntimeError("the soup should not be worse than the best candidate")
folder.cleanup()
