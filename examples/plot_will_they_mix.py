"""
Will my models mix?
===================

Soups work because networks that were fine-tuned from one start lie in one basin: the loss does not
rise between them. Networks that were trained apart compute similar things with weights that have
nothing to do with each other, and their mean is noise. Here is how to tell, before cooking and
without any data, on a folder that mixes well and on one that does not.
"""

# %%
# A folder that mixes
# -------------------
# Six networks, fine-tuned from one pretrained start with random hyper-parameters. ``describe``
# streams the files once and compares the weights, pair by pair. The cosine is the median of those
# between a checkpoint and each of the others: near 1 for relatives, whatever a few bad runs among
# them are like.

import warnings

import matplotlib.pyplot as plt

from sksoup import CheckpointCollection, SoupWarning, UniformSoup
from sksoup.datasets import DigitsConvNet, make_digits_checkpoints
from sksoup.inspection import loss_barrier

zoo = make_digits_checkpoints(n_checkpoints=6, random_state=0)
print(zoo.checkpoints.describe())

# %%
# The same from a terminal, without a line of Python: ``python -m sksoup inspect FOLDER``, whose
# exit status is 1 when the checkpoints look unrelated.
#
# A folder that does not
# ----------------------
# Four networks of the same architecture, each trained from a start of its own on the same digits.
# Every one of them is good, names and shapes agree, and every averaging script would take them.

alone = [
    make_digits_checkpoints(n_checkpoints=1, random_state=seed).folder / "ft00.safetensors"
    for seed in range(4)
]
strangers = CheckpointCollection(
    alone, module=DigitsConvNet, names=[f"trained apart {k}" for k in range(4)]
)
print(strangers.describe())

# %%
# Fitting says so too, from a few numbers of each matrix that are looked at while the weights
# stream by. It warns and goes on, because you may know better. Here, you do not:

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    noise = UniformSoup().fit(strangers, zoo.X_val, zoo.y_val)
soup = UniformSoup().fit(zoo.checkpoints, zoo.X_val, zoo.y_val)

print(next(str(w.message) for w in caught if issubclass(w.category, SoupWarning)))
print(f"soup of relatives {100 * soup.score(zoo.X_test, zoo.y_test):.1f} % on test rows")
print(f"soup of strangers {100 * noise.score(zoo.X_test, zoo.y_test):.1f} %")

# %%
# Look at the loss between them
# -----------------------------
# With held-out rows, `loss_barrier` walks straight lines between checkpoints and to their mean. The
# barrier is how far the loss rises above the line between both ends.

good = loss_barrier(zoo.checkpoints, zoo.X_val, zoo.y_val, n_pairs=5)
bad = loss_barrier(strangers, zoo.X_val, zoo.y_val, n_pairs=5)
print(f"highest barrier: relatives {good.barriers.max():.3f}, strangers {bad.barriers.max():.3f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for axis, found, title in zip(axes, (good, bad), ("one start", "trained apart"), strict=True):
    for (_, last), losses in zip(found.lines, found.losses, strict=True):
        is_mean = last == "mean"
        axis.plot(found.alpha, losses, color="tab:orange" if is_mean else "tab:blue", lw=1.2)
    axis.plot([], [], color="tab:blue", label="between two checkpoints")
    axis.plot([], [], color="tab:orange", label="from a checkpoint (0) to the mean (1)")
    axis.set(title=title, xlabel="place on the line", xticks=[0, 0.5, 1])
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("held-out loss")
axes[1].legend(frameon=False, loc="upper left")
plt.show()

# %%
# What to do
# ----------
# * One stranger in a folder: ``collection.drop(name)``.
# * All of them: there is no soup to be had by mixing weights. Fine-tune all from one pretrained
#   start; `CheckpointEnsemble` still averages the outputs of what you have.
# * A run that diverged has a large distance but may share the start. `GreedySoup` leaves it out.
