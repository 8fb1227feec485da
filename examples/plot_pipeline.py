"""
A soup in a pipeline
====================

Networks are often trained on preprocessed inputs, so that a soup of them is the last step of a
pipeline. There is one pitfall: ``Pipeline.fit`` refits every step. A scaler refitted on a few
validation examples gives the networks inputs that they were not trained on.
"""

# %%
# Networks for tabular data: scikit-learn's breast cancer data set, standardized with a scaler that
# was fitted on the training data. One pretrained start and eight fine-tunings.

import matplotlib.pyplot as plt
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
# ``FrozenEstimator`` keeps the scaler of the training as it is when the pipeline is fitted.

pipe = make_pipeline(FrozenEstimator(scaler), GreedySoup(checkpoints)).fit(X_val, y_val)
print(f"test accuracy: {pipe.score(X_test, y_test):.3f}")
print(f"cross-validated: {cross_val_score(pipe, X_val, y_val, cv=3).mean():.3f}")

# %%
# The pitfall: the same pipeline with a scaler that is refitted on validation data that differ from
# the training data, as often happens in practice. These twenty examples have the largest values of
# the first feature.

few = X_val[:, 0].argsort()[-20:]
trap = make_pipeline(StandardScaler(), GreedySoup(checkpoints, classes=[0, 1]))
trap.fit(X_val[few], y_val[few])
frozen = make_pipeline(FrozenEstimator(scaler), GreedySoup(checkpoints, classes=[0, 1]))
frozen.fit(X_val[few], y_val[few])
print(f"scaler refitted: {trap.score(X_test, y_test):.3f}")
print(f"scaler frozen:   {frozen.score(X_test, y_test):.3f}")

plt.figure(figsize=(6, 2.5), layout="constrained")
scores = [trap.score(X_test, y_test), frozen.score(X_test, y_test)]
bars = plt.barh(["scaler refitted", "scaler frozen"], scores, color=["#d55e00", "#0072b2"])
plt.bar_label(bars, fmt="%.3f", padding=3)
plt.xlim(0, 1.15)
plt.xlabel("test accuracy")
plt.title("The same soup behind a refitted and a frozen scaler")
plt.show()

# %%
# A check.

if frozen.score(X_test, y_test) <= trap.score(X_test, y_test):
    raise RuntimeError("the frozen scaler should do better than the refitted one")
if (pipe[0].transform(X_test) != scaler.transform(X_test)).any():
    raise RuntimeError("the scaler of the training should have been left alone")
