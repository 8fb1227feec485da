"""
Check whether checkpoints can be mixed
======================================

Networks fine-tuned from the same start can be averaged, because the loss does not rise on the line
between them. Networks trained from different starts may be equally good, but their average is
useless. This example shows how to tell the two cases apart without any data.
"""

# %%
# Checkpoints with the same start
# -------------------------------
# Six networks, fine-tuned from the same pretrained weights with random hyperparameters.
# ``describe`` reads the files once and compares the weights pair by pair. The cosine is the median
# over the pairs of a checkpoint with each of the others. It is close to 1 for checkpoints that
# share a start, even if there are a few failed runs among them.

import warnings

import matplotlib.pyplot as plt

from sksoup import CheckpointCollection, SoupWarning, UniformSoup
from sksoup.datasets import DigitsConvNet, make_digits_checkpoints
from sksoup.inspection import loss_barrier

zoo = make_digits_checkpoints(n_checkpoints=6, random_state=0)
print(zoo.checkpoints.describe())

# %%
# On the command line, ``python -m sksoup inspect FOLDER`` does the same. Its exit status is 1 if
# the checkpoints look unrelated.
#
# Checkpoints with different starts
# ---------------------------------
# Four networks of the same architecture, each trained from its own random start on the same digits.
# Each of them is accurate, and names and shapes agree, so nothing prevents averaging them.

alone = [
    make_digits_checkpoints(n_checkpoints=1, random_state=seed).folder / "ft00.safetensors"
    for seed in range(4)
]
unrelated = CheckpointCollection(
    alone, module=DigitsConvNet, names=[f"start {k}" for k in range(4)]
)
print(unrelated.describe())

# %%
# Fitting checks this too, on a sample of the numbers of each tensor, and issues a warning:

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    noise = UniformSoup().fit(unrelated, zoo.X_val, zoo.y_val)
soup = UniformSoup().fit(zoo.checkpoints, zoo.X_val, zoo.y_val)

print(next(str(w.message) for w in caught if issubclass(w.category, SoupWarning)))
print(f"same start       {100 * soup.score(zoo.X_test, zoo.y_test):.1f} % on test rows")
print(f"different starts {100 * noise.score(zoo.X_test, zoo.y_test):.1f} %")

# %%
# The loss between checkpoints
# ----------------------------
# With validation data, `loss_barrier` evaluates the loss on straight lines between checkpoints and
# from checkpoints to their mean. The barrier is how far the loss rises above the line between the
# losses of both ends.

good = loss_barrier(zoo.checkpoints, zoo.X_val, zoo.y_val, n_pairs=5)
bad = loss_barrier(unrelated, zoo.X_val, zoo.y_val, n_pairs=5)
print(f"highest barrier, same start: {good.barriers.max():.3f}")
print(f"highest barrier, different starts: {bad.barriers.max():.3f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for axis, found, title in zip(axes, (good, bad), ("same start", "different starts"), strict=True):
    for (_, last), losses in zip(found.lines, found.losses, strict=True):
        is_mean = last == "mean"
        style = {"color": "#d55e00", "linestyle": "--"} if is_mean else {"color": "#0072b2"}
        axis.plot(found.alpha, losses, linewidth=1.2, **style)
    axis.plot([], [], color="#0072b2", label="between two checkpoints")
    axis.plot(
        [], [], color="#d55e00", linestyle="--", label="from a checkpoint (0) to the mean (1)"
    )
    axis.set(title=title, xlabel="position on the line", xticks=[0, 0.5, 1])
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("validation loss")
axes[0].legend(loc="upper left")
figure.suptitle("Validation loss between checkpoints with the same and with different starts")
plt.show()

# %%
# What to do
# ----------
# * If one checkpoint is unrelated to the others, leave it out: ``collection.drop(name)``.
# * If all are unrelated, averaging weights cannot help. Fine-tune again from one start, or average
#   predictions with `CheckpointEnsemble`.
# * A run that diverged has a large distance: ``collection.healthy()`` and `GreedySoup` leave it
#   out.
