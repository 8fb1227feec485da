"""
Bring your own model
====================

sksoup works with any ``nn.Module``, whatever its inputs, outputs, loss and metric. This tutorial
covers a Hugging Face text classifier, several outputs, custom losses, segmentation and regression.
"""

# %%
# A Hugging Face model, from its folders
# --------------------------------------
#
# ``save_pretrained`` and ``Trainer`` write one folder per run. The architecture is taken from
# ``config.json``, the inputs are the tokenizer's dict, and the outputs are ``logits``. A tiny BERT
# with random weights is used here; ``benchmarks/zoo.py`` does the same with an encoder of 22M
# parameters.

import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    SoupWarning,
    UniformSoup,
)

logging.disable_progress_bar()
rng = np.random.default_rng(0)


def train(net, X, y, criterion, lr, epochs, seed=0):
    """Fine-tune in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(32):
            loss = criterion(net, X, y, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


folder = tempfile.TemporaryDirectory()
ids = rng.integers(1, 50, size=(400, 12))
tokens = {
    "input_ids": torch.as_tensor(ids),
    "attention_mask": torch.ones(400, 12, dtype=torch.long),
}
labels = torch.as_tensor((ids < 20).sum(axis=1) > 4).long()


def bert_loss(net, X, y, rows):
    """Hugging Face models compute the loss if labels are given."""
    return net(**{name: part[rows] for name, part in X.items()}, labels=y[rows]).loss


torch.manual_seed(0)
config = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16, num_labels=2,
)  # fmt: skip
start = train(BertForSequenceClassification(config), tokens, labels, bert_loss, 1e-3, 3)
for run, lr in enumerate([1e-4, 3e-4, 1e-3, 2e-3]):
    net = BertForSequenceClassification(config)
    net.load_state_dict(start.state_dict())
    train(net, tokens, labels, bert_loss, lr, 2, seed=run).save_pretrained(
        Path(folder.name) / f"checkpoint-{run}"
    )

checkpoints = CheckpointCollection.from_path(f"{folder.name}/checkpoint-*")
soup = MEHLSoup(layerwise=True, random_state=0).fit(checkpoints, tokens, labels)
print(type(soup.module_).__name__, f"{soup.score(tokens, labels):.3f}")
soup.save_pretrained(Path(folder.name) / "soup")
again = BertForSequenceClassification.from_pretrained(Path(folder.name) / "soup")

# %%
# Outputs
# -------
#
# A module may return a tensor, a tuple or list that begins with one, a mapping with ``"logits"``,
# or an object with ``.logits``. For anything else, or to convert inputs on the device, pass a
# callable ``forward(module, X) -> outputs``. It is used for the search, for scores and for
# predictions. Outputs of classifiers are logits: for a module that ends in a softmax pass
# ``forward=lambda module, X: module(X).clamp_min(1e-12).log()``, and for one that ends in a sigmoid
# ``forward=lambda module, X: torch.logit(module(X), eps=1e-6)``.

X, y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
X_rest, X_test, y_rest, y_test = train_test_split(X, y, test_size=600, random_state=0)
X_train, X_val, y_train, y_val = train_test_split(X_rest, y_rest, test_size=400, random_state=0)


class TwoHeads(nn.Module):
    """Return a dictionary with other keys."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.digit, self.parity = nn.Linear(64, 10), nn.Linear(64, 1)

    def forward(self, X):
        hidden = self.body(X)
        return {"digit": self.digit(hidden), "parity": self.parity(hidden)}


def both_losses(net, X, y, rows):
    """The sum of the losses of digit and parity."""
    output = net(X[rows])
    parity = nn.functional.binary_cross_entropy_with_logits(
        output["parity"][:, 0], (y[rows] % 2).float()
    )
    return nn.functional.cross_entropy(output["digit"], y[rows]) + parity


def fine_tunings(build, X, y, loss, lrs=(3e-4, 1e-3, 2e-3, 4e-3), shared_start=True):
    """Pretrain, then fine-tune with several learning rates."""
    X, y = torch.as_tensor(X), torch.as_tensor(y)
    torch.manual_seed(0)
    start = train(build(), X, y, loss, 3e-3, 10).state_dict()
    tuned = []
    for seed, lr in enumerate(lrs):
        net = build()
        if shared_start:
            net.load_state_dict(start)
        noisy = X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        tuned.append(train(net, noisy, y, loss, lr if shared_start else 3e-3, 10, seed))
    return CheckpointCollection(tuned)


two_heads = fine_tunings(TwoHeads, X_train, y_train, both_losses)
noise = 0.3 * rng.standard_normal(X_val.shape).astype("float32")
soup = MEHLSoup(forward=lambda module, X: module(X)["digit"], random_state=0)
print(f"digits: {soup.fit(two_heads, X_val + noise, y_val).score(X_test, y_test):.3f}")

# %%
# A single logit is treated as two logits, one of which is 0, so that ``predict_proba`` has two
# columns. A custom criterion receives the single logit, as ``BCEWithLogitsLoss`` expects.

parity = LearnedSoup(
    forward=lambda module, X: module(X)["parity"], criterion=nn.BCEWithLogitsLoss, random_state=0
)
parity.fit(two_heads, X_val + noise, y_val % 2)
print(f"parity: {parity.score(X_test, y_test % 2):.3f}, {parity.predict_proba(X_test).shape}")

# %%
# The loss
# --------
#
# ``criterion`` is a class, an instance or any callable ``(outputs, targets) -> loss``, for example
# with class weights and label smoothing:

criterion = nn.CrossEntropyLoss(weight=torch.linspace(1, 2, 10), label_smoothing=0.1)
soup = MEHLSoup(forward=lambda module, X: module(X)["digit"], criterion=criterion, random_state=0)
print(f"digits: {soup.fit(two_heads, X_val + noise, y_val).score(X_test, y_test):.3f}")

# %%
# Labels of pixels or tokens
# --------------------------
#
# For segmentation and token classification, labels are integers of shape ``(n_samples, ...)`` and
# outputs have shape ``(n_samples, n_outputs, ...)``, as in PyTorch's losses. The label -100
# excludes a position from loss and score. If your masks mark such positions by another label, such
# as 255, replace it, ``y[y == 255] = -100``, or pass
# ``criterion=nn.CrossEntropyLoss(ignore_index=255)`` to a method with a ``criterion``. One logit
# per position, of shape ``(n_samples, 1, ...)``, also works for the labels 0 and 1, and masks may
# be booleans or floats. Here, pixels of noisy images are classified as ink or background, without
# the unlabeled border.

ink = (X_rest > 0.3).astype(np.int64).reshape(-1, 8, 8)
ink[:, [0, -1]] = -100


def pixel_loss(net, X, y, rows):
    """Cross-entropy of every labeled pixel."""
    return nn.functional.cross_entropy(net(X[rows]), y[rows])


def segmenter():
    """A small fully convolutional network."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 2, 3, padding=1),
    )  # fmt: skip


pixels = fine_tunings(segmenter, X_rest[:800], ink[:800], pixel_loss)
noisy = X_rest[800:] + 0.3 * rng.standard_normal(X_rest[800:].shape).astype("float32")
soup = MEHLSoup(random_state=0).fit(pixels, noisy, ink[800:])
print(f"pixels: {soup.score(noisy, ink[800:]):.3f}, {soup.predict(noisy).shape}")

# %%
# Regression, and a soup that fails
# ---------------------------------
#
# ``task="regression"`` accepts one target or several and scores by R². The networks below estimate
# by how much a digit was rotated. Fine-tuned from one start, their soups are about as good as the
# best checkpoint, or better.


def turned(images, seed):
    """Digits rotated by up to 60 degrees either way, and the angles / 60."""
    angle = np.random.default_rng(seed).uniform(-1, 1, len(images)).astype("float32")
    rows = [
        rotate(image.reshape(8, 8), 60 * a, reshape=False, order=1).ravel()
        for image, a in zip(images, angle, strict=True)
    ]
    return np.stack(rows), angle


def square_loss(net, X, y, rows):
    """Mean squared error."""
    return nn.functional.mse_loss(net(X[rows])[:, 0], y[rows])


def angles():
    """A network with one output."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )


def r2_of(checkpoints):
    """Test R² of the best checkpoint and of three soups."""
    scores = {}
    for recipe in (
        BestCheckpoint(task="regression"),
        UniformSoup(task="regression"),
        GreedySoup(task="regression"),
        MEHLSoup(task="regression", layerwise=True, random_state=0),
    ):
        recipe.fit(checkpoints, *turned(X_val, 1))
        scores[type(recipe).__name__] = recipe.score(*turned(X_test, 2))
        print(f"{type(recipe).__name__:16}{scores[type(recipe).__name__]:7.3f}")
    return scores


together = r2_of(fine_tunings(angles, *turned(X_train, 0), square_loss))

# %%
# Trained from *different* starts, each network is as good, but their mean is useless: R² falls from
# 0.93 to 0.05. Fitting issues a warning.

apart = fine_tunings(angles, *turned(X_train, 0), square_loss, shared_start=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", SoupWarning)
    separate = r2_of(apart)
print(caught[0].message)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
for shift, (scores, label, color, hatch) in enumerate(
    ((together, "same start", "#0072b2", ""), (separate, "different starts", "#d55e00", "//"))
):
    places = np.arange(len(scores)) + 0.4 * shift
    axes.bar(places, list(scores.values()), 0.38, label=label, color=color, hatch=hatch)
axes.set_xticks(np.arange(len(together)) + 0.2, list(together))
axes.set(ylabel="test R²", title="Regression soups of networks with the same or different starts")
axes.legend(loc="lower right")
plt.show()

# %%
# ``describe`` reports it before anything is mixed:

print(*apart.describe().verdict, sep="\n")

# %%
# Buffers and other state
# -----------------------
#
# Tied weights stay tied, frozen parts are copied, integer buffers are taken from the checkpoint
# with the largest coefficient, and buffers outside the state dict are not changed. Weight norm and
# spectral norm are mixed in their own parametrization. For BatchNorm, see :doc:`plot_batch_norm`.
# Dropout is off, in the search as well (:doc:`/concepts`).
#
# Export
# ------
#
# ``module_`` is your module with the weights of the soup, in eval mode. It can be exported like any
# other module, with ``torch.export`` as here or with ``torch.onnx.export(soup.module_, args)``.

program = torch.export.export(again, args=(), kwargs={name: t[:2] for name, t in tokens.items()})
print(f"{type(program).__name__} with {len(program.state_dict)} tensors")
folder.cleanup()
