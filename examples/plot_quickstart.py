"""
From a folder of checkpoints to one better model
================================================

Somebody fine-tuned the same network 24 times. Usual practice keeps the file with the best
held-out score. Here the ten systems of the two papers, and `MEHLSoup` as it is by default, turn the
whole folder into one model each, using the held-out rows only, and are then compared on test rows
that none of them saw.
"""

# %%
# The zoo
# -------
# A small convolutional network, pretrained once on real digits and fine-tuned 24 times from that
# start on shifted and noisy ones, with random hyper-parameters. The 24 files come with sksoup, so
# that everybody sees the same accuracies, up to 0.1 points: processors round differently. Opening
# the folder reads headers only.

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
# ``layerwise=True`` gives every parameter tensor its own coefficients. They sum to 1, yet may be
# negative: the soup may lie outside of the checkpoints, not only between them.

soup = MEHLSoup(layerwise=True, random_state=0)
soup.fit(ckpts, zoo.X_val, zoo.y_val)
print(f"test accuracy {100 * soup.score(zoo.X_test, zoo.y_test):.2f} %")
print(f"coefficients {soup.coef_.shape}, from {soup.coef_.min():.2f} to {soup.coef_.max():.2f}")

# %%
# All systems
# -----------
# `compare_soups` fits them on the held-out rows and measures them. Passes are passes of one model
# over the held-out rows; memory is in sizes of one model, beside the module itself.


def tell(result: SoupResult) -> None:
    """Print a line as soon as a system is done."""
    print(f"  {result.system}: {result.seconds:.1f} s", flush=True)


comparison = compare_soups(ckpts, zoo.X_val, zoo.y_val, zoo.X_test, zoo.y_test, on_result=tell)
print()
print(comparison)

# %%
# What it buys, and what it costs
# -------------------------------
# Test accuracy against the memory that fitting took. MEHL-Soup works on a quarter of the
# checkpoints at a time; Centered-Soup, which is `MEHLSoup` by default, on as many as memory holds.

figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for result in comparison.results:
    is_ours = result.system.startswith(("MEHL", "Centered"))
    axes.plot(
        result.extra_memory, 100 * result.test, "o", color="tab:orange" if is_ours else "tab:blue"
    )
labelled: list[tuple[float, float]] = []
for result in sorted(comparison.results, key=lambda r: r.test):
    x, y = result.extra_memory, 100 * result.test
    while any(abs(x - a) < 8 and abs(y - b) < 0.12 for a, b in labelled):
        y += 0.04  # move a label up until it is free
    labelled.append((x, y))
    axes.annotate(result.system, (x, y), (6, 0), textcoords="offset points", va="center")
axes.set(
    xlabel="peak memory of fitting, in models",
    ylabel="test accuracy, %",
    title="Twelve systems, one folder of checkpoints",
    xlim=(-1, 36),
)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("quickstart.png", dpi=120)
plt.show()

# %%
# Save, verify, rebuild
# ---------------------
# The file holds the weights and the recipe: which checkpoints (by SHA-256), which coefficients.
# Anyone who has the checkpoints can rebuild it, bit for bit.

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
