"""
Look at a soup
==============

Coefficients, paths and barriers are looked at, not read. The displays follow scikit-learn's
convention:
``from_estimator``, ``plot(ax=...)``, ``figure_``, ``ax_``.
"""

# %%
# Three soups of the same networks
# --------------------------------

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from sksoup import GreedySoup, MEHLSoup
from sksoup.datasets import make_digits_checkpoints
from sksoup.inspection import (
    CoefficientsDisplay,
    ComparisonDisplay,
    GreedyPathDisplay,
    IngredientImportanceDisplay,
    LearningCurveDisplay,
    LossBarrierDisplay,
    ingredient_importance,
)

digits = make_digits_checkpoints(random_state=0)
held_out = digits.X_val, digits.y_val
recipes = {
    "Greedy": GreedySoup(),
    "MEHL": MEHLSoup(model_batch_size=6, random_state=0),
    "MEHL+": MEHLSoup(layerwise=True, model_batch_size=6, random_state=0),
}
for recipe in recipes.values():
    recipe.fit(digits.checkpoints, *held_out)
greedy, scalar, layerwise = recipes.values()
ComparisonDisplay(
    list(recipes),
    held_out=[soup.score(*held_out) for soup in recipes.values()],
    test=[soup.score(digits.X_test, digits.y_test) for soup in recipes.values()],
).plot()

# %%
# Coefficients
# ------------
#
# One number per checkpoint; those outside [0, 1] are red, the dotted line is the uniform soup.

CoefficientsDisplay.from_estimator(scalar)

# %%
# With one row per layer it is a map, white at 0; or, as in the MEHL paper's Figure 1, a histogram.

CoefficientsDisplay.from_estimator(layerwise)

# %%

CoefficientsDisplay.from_estimator(layerwise, kind="histogram")

# %%
# What greedy tried
# -----------------
#
# Candidates in the order of their own scores. Triangles are upper bounds: the candidate was
# rejected before all rows were seen. The band is one standard error of the soup's score: gains
# within it may be luck.

GreedyPathDisplay.from_estimator(greedy)

# %%
# Which ingredients matter
# ------------------------
#
# The score that the soup loses where an ingredient's share is given to the others, in proportion to
# their coefficients. Bars to the left, in orange: the soup is better without it on these rows.

importance = ingredient_importance(scalar, *held_out)
IngredientImportanceDisplay.from_importance(importance)
print(importance)

# %%
# The search, and the landscape
# -----------------------------
#
# The held-out loss step by step, and along straight lines between the ingredients of the greedy
# soup: no barrier, so they may be mixed.

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
LearningCurveDisplay.from_estimator(layerwise, ax=left)
LossBarrierDisplay.from_estimator(greedy, *held_out, ax=right, n_points=7)

# %%
# A report to mail
# ----------------
#
# One HTML file with all of this, readable in any browser without a network: what was mixed, how
# well it does, and what to look at. Given what ``compare_soups`` measured, it shows the soup beside
# the others; given ``importance=``, which ingredients matter.

with tempfile.TemporaryDirectory() as folder:
    page = Path(folder) / "soup.html"
    scalar.report(page, importance=importance)
    print(f"{page.stat().st_size / 1000:.0f} kB")
