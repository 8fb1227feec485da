"""
BatchNorm: mix the statistics or re-estimate them
=================================================

BatchNorm normalizes by running means and variances of the training data. In a soup, they can be
averaged like the weights, which needs no data and can be rebuilt from the recipe, or re-estimated
on the validation data. This example compares both.
"""

# %%
# A small residual network with BatchNorm, pretrained on clean digits and fine-tuned twelve times on
# shifted, noisy ones.

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import shift
from scipy.stats import loguniform
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from torch import nn

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, MEHLSoup, UniformSoup
from sksoup.model_selection import SoupSearchCV


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, X):
        return (X + self.body(X)).relu()


class SmallResNet(nn.Module):
    """A stem, two residual blocks and a head, for rows of 64 pixels."""

    def __init__(self, width=24):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(Block(width), nn.MaxPool2d(2), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, X):
        images = self.stem(X.reshape(-1, 1, 8, 8)).relu()
        return self.head(self.blocks(images).mean(dim=(2, 3)))


rng = np.random.default_rng(0)
X, y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
X_clean, X_task, y_clean, y_task = train_test_split(X, y, test_size=0.7, random_state=0)
moved = [shift(row.reshape(8, 8), rng.integers(-1, 2, 2)).ravel() for row in X_task]
X_task = (np.array(moved) + rng.normal(0, 0.2, X_task.shape)).astype("float32")
X_tune, X_test, y_tune, y_test = train_test_split(X_task, y_task, test_size=0.4, random_state=0)
X_tune, X_val, y_tune, y_val = train_test_split(X_tune, y_tune, test_size=0.4, random_state=0)

torch.manual_seed(0)
net = NeuralNetClassifier(
    SmallResNet,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.AdamW,
    lr=0.003,
    max_epochs=8,
    batch_size=64,
    iterator_train__shuffle=True,
    train_split=None,
    verbose=0,
).fit(X_clean, y_clean)
search = SoupSearchCV(
    net, {"lr": loguniform(1e-3, 1e-2), "max_epochs": [4, 6, 8]}, n_iter=12, random_state=0
)
found = search.fit(X_tune, y_tune).checkpoints_
checkpoints = CheckpointCollection(dict(found), module=found.module)  # without the search's scores
print(checkpoints)

# %%
# Each method with both policies, and with ``"auto"``, which keeps whichever scores better on the
# validation data.

systems = {
    "Uniform-Soup": UniformSoup(),
    "Greedy-Soup": GreedySoup(),
    "MEHL-Soup+": MEHLSoup(layerwise=True, model_batch_size=3, random_state=0),
}
best = BestCheckpoint().fit(checkpoints, X_val, y_val).score(X_test, y_test)
print(f"{'test accuracy, %':18}{'average':>12}{'recalibrate':>12}{'auto':>12}")
print(f"{'Best checkpoint':18}{100 * best:12.2f}")
table = {}
for name, soup in systems.items():
    for policy in ("average", "recalibrate", "auto"):
        soup.set_params(batch_norm=policy).fit(checkpoints, X_val, y_val)
        table[name, policy] = 100 * soup.score(X_test, y_test)
    print(
        f"{name:18}"
        + "".join(f"{table[name, p]:12.2f}" for p in ("average", "recalibrate", "auto"))
    )

# %%
# Re-estimated tensors are listed in the soup and in its recipe. They cannot be rebuilt from the
# checkpoints alone; ``verify`` reports them as not checked.

soup = UniformSoup(batch_norm="recalibrate").fit(checkpoints, X_val, y_val)
print(soup.recalibrated_[:2], "...")
mixed = UniformSoup().fit(checkpoints, X_val, y_val)
names = [name for name in soup.recalibrated_ if name.endswith("running_var")]
ratios = {name: mixed.state_dict()[name] / soup.state_dict()[name] for name in names}
for name, ratio in ratios.items():
    print(f"{name:32} mixed / re-estimated: {ratio.min():.2f} to {ratio.max():.2f}")

# %%
# In the first layer, whose inputs are the images, both agree; in deeper layers they differ. The
# figure shows mixed against re-estimated variances for every layer.

markers = iter("osD^v")
for (name, a), b in zip(mixed.module_.named_buffers(), soup.module_.buffers(), strict=True):
    if name.endswith("running_var"):
        plt.scatter(b, a, s=14, marker=next(markers), label=name.removesuffix(".running_var"))
plt.axline((0.1, 0.1), slope=1, color="grey", ls=":")
plt.loglog()
plt.xlabel("re-estimated variance")
plt.ylabel("mixed variance")
plt.title("BatchNorm variances of a soup: mixed against re-estimated")
plt.legend()
plt.show()

# %%
# A check: on the validation data, ``"auto"`` is never worse than mixing.

scores = [
    UniformSoup(batch_norm=policy).fit(checkpoints, X_val, y_val).score(X_val, y_val)
    for policy in ("average", "auto")
]
if scores[1] < scores[0]:
    raise RuntimeError("auto should not be worse than mixing on the validation data")
