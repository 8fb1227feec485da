"""
Bring your own data
===================

Held-out rows come in many forms: arrays, tensors, dicts of them, data sets, loaders, streams. A
soup takes them as they are, and gives the same bits for the same rows whatever they come in.
"""

# %%
# A few small fine-tuned networks
# -------------------------------
#
# Eight convolutional networks for digits, fine-tuned from one start (made once, then cached).

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sksoup import CheckpointCollection, GreedySoup, MEHLSoup
from sksoup.datasets import make_digits_checkpoints

digits = make_digits_checkpoints(random_state=0)
checkpoints = digits.checkpoints.select(digits.checkpoints.names[:8])
X_val, y_val = digits.X_val, digits.y_val
X_test, y_test = digits.X_test, digits.y_test
recipe = MEHLSoup(layerwise=True, max_epochs=2, random_state=0)

# %%
# Arrays and tensors
# ------------------
#
# The plain form. Floating inputs are converted to the module's dtype, integers are fed as they are.
# Tensors that are on a GPU stay there.

soup = recipe.fit(checkpoints, X_val, y_val)
plain = soup.coef_.copy()
print(f"accuracy on test rows: {soup.score(X_test, y_test):.3f}")

same = recipe.fit(checkpoints, torch.as_tensor(X_val), torch.as_tensor(y_val))
assert np.array_equal(same.coef_, plain)

# %%
# Data sets and loaders
# ---------------------
#
# A ``Dataset`` or ``DataLoader`` of ``(rows, targets)`` needs no ``y``. It is walked once, with its
# own sampler and workers, and the rows stay in memory for the search: held-out data is small, and
# every checkpoint has to see it. Global random state is afterwards what it was.


class Digits(Dataset):
    """Decodes one row at a time, as a folder of images would."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, k):
        return self.X[k], int(self.y[k])


loader = DataLoader(Digits(X_val, y_val), batch_size=50, num_workers=2)
for data in (Digits(X_val, y_val), loader, TensorDataset(*map(torch.as_tensor, (X_val, y_val)))):
    soup = recipe.fit(checkpoints, data)
    assert np.array_equal(soup.coef_, plain)
print(f"accuracy on test rows: {soup.score(Digits(X_test, y_test)):.3f}")

# %%
# A loader that shuffles can be fitted and scored on, since rows and targets stay together. Where
# rows must come in order, it is refused: to predict, and when targets or weights are given apart.

shuffling = DataLoader(Digits(X_test, y_test), batch_size=50, shuffle=True)
print(f"accuracy on test rows: {soup.score(shuffling):.3f}")
try:
    soup.predict(shuffling)
except ValueError as error:
    print(error)

# %%
# Streams
# -------
#
# An ``IterableDataset``, or an iterator of batches, is walked once. What is already used up is an
# error, not an empty score.


class Stream(IterableDataset):
    """Rows from somewhere that can only be read from the beginning."""

    def __iter__(self):
        yield from zip(X_test, y_test.tolist(), strict=True)


print(f"accuracy on test rows: {soup.score(Stream()):.3f}")
batches = iter(DataLoader(Stream(), batch_size=100))
p = soup.predict_proba(batches)
try:
    soup.predict(batches)
except ValueError as error:
    print(error)

# %%
# ``predict``, ``predict_proba`` and ``score`` hold only a few minibatches of a loader in memory, so
# it may be larger than that. To *fit*, the rows are kept. When they are too many, hold out fewer,
# or keep images as ``uint8``, a quarter of the size, and convert them on the device with
# ``forward``:

mean, scale = X_val.min(), np.ptp(X_val)
as_bytes = np.round(255 * (X_val - mean) / scale).astype(np.uint8)


def from_bytes(module, X):
    """Undo what made bytes of the pixels, on the device where the module runs."""
    return module(X / 255 * scale + mean)


soup = MEHLSoup(layerwise=True, max_epochs=2, random_state=0, forward=from_bytes)
soup.fit(checkpoints, as_bytes, y_val)
print(f"accuracy on held-out rows: {soup.score(as_bytes, y_val):.3f}, {as_bytes.nbytes:,} bytes")

# %%
# Several inputs
# --------------
#
# A mapping is fed by name, ``module(**X)``, and a tuple by position, ``module(*X)``: arrays,
# tensors, skorch's ``SliceDict``, or batches of a loader. Targets in a mapping are taken from
# ``labels`` (or ``label``, ``targets``, ``target``, ``y``); ``y="name"`` names any other key. So a
# tokenised ``datasets.Dataset`` goes in as it is, once columns that are no tensors are dropped.

texts = ["a fine soup", "a poor broth", "fine bread", "poor wine", "very fine", "so poor"] * 20
vocabulary = {word: k for k, word in enumerate(sorted({w for t in texts for w in t.split()}), 1)}


def tokenise(row):
    """Numbers of the words, three per text."""
    ids = [vocabulary[word] for word in row["text"].split()]
    return {"ids": [*ids, 0, 0][:3]}


data = datasets.Dataset.from_dict({"text": texts, "label": [1, 0] * 60})
datasets.disable_progress_bars()
tokens = data.map(tokenise, remove_columns="text")


class BagOfWords(nn.Module):
    """The mean of the words' vectors, and a head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.head = nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(self.words(ids).mean(dim=1))


torch.manual_seed(0)
start = BagOfWords()
tuned = []
for lr in (0.02, 0.05, 0.1):
    net = BagOfWords()
    net.load_state_dict(start.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for batch in DataLoader(tokens.with_format("torch"), batch_size=20):
        loss = nn.functional.cross_entropy(net(batch["ids"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned.append(net)
text_soup = GreedySoup().fit(CheckpointCollection(tuned), tokens)
print(f"accuracy: {text_soup.score(tokens):.3f}; inputs: {text_soup.input_names_}")

# %%
# Weights of rows
# ---------------
#
# ``sample_weight`` weighs rows in the loss and in the held-out score, here to make the digit 8
# count three times.

eights = y_test == 8
for weight in (None, np.where(y_val == 8, 3.0, 1.0)):
    soup = recipe.fit(checkpoints, X_val, y_val, sample_weight=weight)
    found = soup.score(X_test[eights], y_test[eights])
    print(f"accuracy on eights{'' if weight is None else ', which count three times'}: {found:.3f}")

# %%
# What does not fit is said before anything is computed, with what was expected and what came:

try:
    recipe.fit(checkpoints, X_val[:, :-1], y_val)
except ValueError as error:
    print(error)
