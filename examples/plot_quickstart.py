"""
From a folder of checkpoints to one better model
================================================

A network was fine-tuned 24 times. The usual practice is to keep only the checkpoint with the best
validation score. This tutorial mixes all of them into one better model, compares the methods of the
two papers with `MEHLSoup` on test data, and saves the result.
"""

# %%
# The checkpoints
# ---------------
# A small convolutional network was pretrained on scikit-learn's digits and fine-tuned 24 times on
# shifted, noisy digits with random hyperparameters. The 24 files come with sksoup, so accuracies
# are the same everywhere up to 0.1 points: processors round differently. Opening the folder reads
# only file headers.

import matplotlib.pyplot as plt

from sksoup import CheckpointCollection, MEHLSoup
from sksoup.datasets import DigitsConvNet, load_digits_checkpoints
from sksoup.inspection import SoupResult, compare_soups

zoo = load_digits_checkpoints()
ckpts = CheckpointCollection.from_path(zoo.folder, module=DigitsConvNet)
print(ckpts)

# %%
# One better model in three lines
# -------------------------------
# ``layerwise=True`` gives every parameter tensor its own coefficients. They sum to 1 but may be
# negative, so the soup need not lie between the checkpoints.

soup = MEHLSoup(layerwise=True, random_state=0)
soup.fit(ckpts, zoo.X_val, zoo.y_val)
print(f"test accuracy {100 * soup.score(zoo.X_test, zoo.y_test):.2f} %")
print(f"coefficients {soup.coef_.shape}, from {soup.coef_.min():.2f} to {soup.coef_.max():.2f}")

# %%
# All methods
# -----------
# `compare_soups` fits each method on the validation data and evaluates it on the test data.
# *Forward* and *backward* count passes over the validation data, *extra memory* is in sizes of one
# model.


def tell(result: SoupResult) -> None:
    """Print a line as soon as a method is done."""
    print(f"  {result.system}: {result.seconds:.1f} s", flush=True)


comparison = compare_soups(ckpts, zoo.X_val, zoo.y_val, zoo.X_test, zoo.y_test, on_result=tell)
print()
print(comparison)

# %%
# Gain and cost
# -------------
# The figure shows the difference in test accuracy to the best checkpoint, and the memory that
# fitting took. MEHL-Soup holds a quarter of the checkpoints at a time; Centered-Soup (`MEHLSoup`
# with its defaults) as many as fit.

results = sorted(comparison.results, key=lambda result: result.test)
names = [result.system for result in results]
best = next(result.test for result in results if result.system == "Best checkpoint")
learned = [name.startswith(("MEHL", "HL", "Learned", "Centered")) for name in names]

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 4.4), sharey=True, layout="constrained")
for chosen, label, marker, color in (
    (True, "coefficients from gradients", "D", "#d55e00"),
    (False, "other methods", "o", "#0072b2"),
):
    rows = [row for row, is_learned in enumerate(learned) if is_learned == chosen]
    gains = [100 * (results[row].test - best) for row in rows]
    left.plot(gains, rows, marker, color=color, label=label)
    right.plot([results[row].extra_memory for row in rows], rows, marker, color=color, label=label)
left.axvline(0, color="grey", linestyle=":")
left.set(xlabel="test accuracy minus best checkpoint, points", yticks=range(len(names)))
left.set_yticklabels(names)
right.set(xlabel="memory to fit, in models")
for axes in (left, right):
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
figure.suptitle("Twelve methods on the same 24 checkpoints")
figure.savefig("quickstart.png", dpi=120)
plt.show()

# %%
# Save, verify, rebuild
# ---------------------
# The file holds the weights and the recipe: the checkpoints (with their SHA-256) and the
# coefficients. Anyone who has the checkpoints can rebuild the soup bit for bit.

import tempfile
from pathlib import Path

import torch

from sksoup import Recipe

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "soup.safetensors"
    soup.save(path)
    rebuilt = Recipe.load(path).cook(ckpts)
same = all(torch.equal(rebuilt[name], value) for name, value in soup.state_dict().items())
print("rebuilt bit for bit:", same)
