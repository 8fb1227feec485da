"""
A soup in a pipeline
====================

Networks are trained on preprocessed inputs, so a soup of them stands at the end of a pipeline.
There is one trap: ``Pipeline.fit`` refits every step, and a scaler that is refitted on a few
held-out rows feeds the networks something they were not trained on.
"""

# %%
# Networks for a table: scikit-learn's breast-cancer data, standardized with a scaler that was
# fitted on the training rows. One pretrained start, then eight fine-tunings with other seeds and
# rates.

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from sksoup import GreedySoup
from sksoup.model_selection import SoupSearchCV

X, y = load_breast_cancer(return_X_y=True)
X = X.astype("float32")
X_train, X_rest, y_train, y_rest = train_test_split(X, y, stratify=y, random_state=0)
X_val, X_test, y_val, y_test = train_test_split(
    X_rest, y_rest, test_size=0.5, stratify=y_rest, random_state=0
)
scaler = StandardScaler().fit(X_train)

torch.manual_seed(0)
net = NeuralNetClassifier(
    nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2)),
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.AdamW,
    lr=0.01,
    max_epochs=5,
    train_split=None,
    verbose=0,
).fit(scaler.transform(X_train), y_train)
fine_tunings = SoupSearchCV(
    net, {"lr": [0.001, 0.003, 0.01], "batch_size": [16, 32, 64]}, n_iter=8, random_state=0
).fit(scaler.transform(X_train), y_train)
checkpoints = fine_tunings.checkpoints_

# %%
# The scaler of the training, frozen: ``fit`` leaves it alone, and everything scikit-learn does with
# a pipeline works.

pipe = make_pipeline(FrozenEstimator(scaler), GreedySoup(checkpoints)).fit(X_val, y_val)
print(pipe)
print(f"test accuracy: {pipe.score(X_test, y_test):.3f}")
print(f"cross-validated: {cross_val_score(pipe, X_val, y_val, cv=3).mean():.3f}")

# %%
# The trap: the same pipeline with a scaler that is refitted, on held-out rows that differ from the
# training rows, as they do in practice. These twenty come from one end of the first feature.

few = X_val[:, 0].argsort()[-20:]
trap = make_pipeline(StandardScaler(), GreedySoup(checkpoints, classes=[0, 1]))
trap.fit(X_val[few], y_val[few])
frozen = make_pipeline(FrozenEstimator(scaler), GreedySoup(checkpoints, classes=[0, 1]))
frozen.fit(X_val[few], y_val[few])
print(f"scaler refitted: {trap.score(X_test, y_test):.3f}")
print(f"scaler frozen:   {frozen.score(X_test, y_test):.3f}")

# %%
# The result, checked.

if frozen.score(X_test, y_test) <= trap.score(X_test, y_test):
    raise RuntimeError("the frozen scaler should do better than the refitted one")
if (pipe[0].transform(X_test) != scaler.transform(X_test)).any():
    raise RuntimeError("the scaler of the training should have been left alone")
