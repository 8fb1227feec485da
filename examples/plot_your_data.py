"""
Bring your own data
===================

Validation and test data may be arrays, tensors, dicts of them, data sets, loaders or streams. The
same examples give bit-identical results in any form.
"""

# %%
# A few small fine-tuned networks
# -------------------------------
#
# Eight convolutional networks for digits, fine-tuned from one start.

import datasets
import matplotlib.pyplot as plt
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
# Floating point inputs are converted to the module's dtype; integers are passed as they are.
# Tensors on a GPU stay there.

soup = recipe.fit(checkpoints, X_val, y_val)
plain = soup.coef_.copy()
print(f"test accuracy: {soup.score(X_test, y_test):.3f}")

same = recipe.fit(checkpoints, torch.as_tensor(X_val), torch.as_tensor(y_val))
assert np.array_equal(same.coef_, plain)

# %%
# Data sets and loaders
# ---------------------
#
# A ``Dataset`` or ``DataLoader`` of ``(inputs, targets)`` needs no ``y``. It is read once, with its
# own sampler and workers, and kept in memory during the search. The global random state is not
# changed.


class Digits(Dataset):
    """Decode one example at a time, as a folder of images would."""

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
print(f"test accuracy: {soup.score(Digits(X_test, y_test)):.3f}")

# %%
# A loader that shuffles can be used to fit and score, since inputs and targets stay together. It
# raises an error where the order matters: for predictions, and if targets or weights are given
# separately.

shuffling = DataLoader(Digits(X_test, y_test), batch_size=50, shuffle=True)
print(f"test accuracy: {soup.score(shuffling):.3f}")
try:
    soup.predict(shuffling)
except ValueError as error:
    print(error)

# %%
# Streams
# -------
#
# An ``IterableDataset`` or an iterator of batches is read once. An exhausted iterator is an error.


class Stream(IterableDataset):
    """Examples that can only be read from the beginning."""

    def __iter__(self):
        yield from zip(X_test, y_test.tolist(), strict=True)


print(f"test accuracy: {soup.score(Stream()):.3f}")
batches = iter(DataLoader(Stream(), batch_size=100))
p = soup.predict_proba(batches)
try:
    soup.predict(batches)
except ValueError as error:
    print(error)

# %%
# ``predict``, ``predict_proba`` and ``score`` hold only a few minibatches of a loader in memory.
# ``fit`` keeps all examples that can be read only once. To save memory, images can be stored as
# ``uint8``, a quarter of the size, and converted on the device with ``forward``:

mean, scale = X_val.min(), np.ptp(X_val)
as_bytes = np.round(255 * (X_val - mean) / scale).astype(np.uint8)


def from_bytes(module, X):
    """Convert bytes back to pixels, on the device of the module."""
    return module(X / 255 * scale + mean)


soup = MEHLSoup(layerwise=True, max_epochs=2, random_state=0, forward=from_bytes)
soup.fit(checkpoints, as_bytes, y_val)
print(f"validation accuracy: {soup.score(as_bytes, y_val):.3f}, {as_bytes.nbytes:,} bytes")

# %%
# Several inputs
# --------------
#
# A mapping is passed by name, ``module(**X)``, and a tuple by position, ``module(*X)``. Its values
# are arrays, tensors, skorch's ``SliceDict``, or batches of a loader. Targets in a mapping are
# taken from ``labels`` (or ``label``, ``targets``, ``target``, ``y``); ``y="name"`` selects any
# other key. A tokenized ``datasets.Dataset`` can be used once columns that are not tensors are
# dropped.

texts = ["a fine soup", "a poor broth", "fine bread", "poor wine", "very fine", "so poor"] * 20
vocabulary = {word: k for k, word in enumerate(sorted({w for t in texts for w in t.split()}), 1)}


def tokenize(row):
    """The ids of the words, three per text."""
    ids = [vocabulary[word] for word in row["text"].split()]
    return {"ids": [*ids, 0, 0][:3]}


data = datasets.Dataset.from_dict({"text": texts, "label": [1, 0] * 60})
datasets.disable_progress_bars()
tokens = data.map(tokenize, remove_columns="text")


class BagOfWords(nn.Module):
    """The mean of the word vectors, and a linear head."""

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
# Sample weights
# --------------
#
# ``sample_weight`` weights the examples in the loss and in the validation score. Here the digit 8
# counts three times.

by_digit = {}
for weight in (None, np.where(y_val == 8, 3.0, 1.0)):
    soup = recipe.fit(checkpoints, X_val, y_val, sample_weight=weight)
    by_digit[weight is not None] = [
        soup.score(X_test[y_test == digit], y_test[y_test == digit]) for digit in range(10)
    ]
    label = "equal weights" if weight is None else "eights count three times"
    print(f"accuracy on eights, {label}: {by_digit[weight is not None][8]:.3f}")

plt.bar(np.arange(10) - 0.2, by_digit[False], 0.4, color="#0072b2", label="equal weights")
plt.bar(
    np.arange(10) + 0.2, by_digit[True], 0.4, color="#d55e00", hatch="//", label="8 counts 3 times"
)
plt.xticks(range(10))
plt.ylim(0.5, 1)
plt.xlabel("digit")
plt.ylabel("test accuracy")
plt.title("Accuracy by digit of a soup with and without sample weights")
plt.legend(loc="lower left")
plt.show()

# %%
# Inputs that do not fit raise an error before anything is computed:

try:
    recipe.fit(checkpoints, X_val[:, :-1], y_val)
except ValueError as error:
    print(error)
