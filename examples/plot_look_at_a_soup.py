"""
Look at a soup
==============

Plot the coefficients of a soup, the path of the greedy search and the importance of each
checkpoint, and write a report. The displays follow scikit-learn's convention (``from_estimator``,
``plot(ax=...)``, ``figure_``, ``ax_``).
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
validation = digits.X_val, digits.y_val
recipes = {
    "Greedy": GreedySoup(),
    "MEHL": MEHLSoup(model_batch_size=6, random_state=0),
    "MEHL+": MEHLSoup(layerwise=True, model_batch_size=6, random_state=0),
}
for recipe in recipes.values():
    recipe.fit(digits.checkpoints, *validation)
greedy, scalar, layerwise = recipes.values()
ComparisonDisplay(
    list(recipes),
    held_out=[soup.score(*validation) for soup in recipes.values()],
    test=[soup.score(digits.X_test, digits.y_test) for soup in recipes.values()],
).plot().figure_.suptitle("Validation and test accuracy of three soups")

# %%
# Coefficients
# ------------
#
# One number per checkpoint. Coefficients outside [0, 1] are orange; the dotted line is the uniform
# soup.

display = CoefficientsDisplay.from_estimator(scalar)
display.ax_.set_title("Coefficient of each checkpoint")

# %%
# With one set of coefficients per layer, the display is a heat map, white at 0. A histogram, as in
# Figure 1 of the MEHL paper, is available too.

display = CoefficientsDisplay.from_estimator(layerwise)
display.ax_.set_title("Coefficients of each checkpoint and layer")

# %%

display = CoefficientsDisplay.from_estimator(layerwise, kind="histogram")
display.ax_.set_title("Histogram of the coefficients")

# %%
# The path of the greedy search
# -----------------------------
#
# Candidates are tried in the order of their own scores. Triangles are upper bounds of candidates
# that were rejected before all examples were evaluated. The band is one standard error of the
# soup's score; gains within it may be due to chance.

display = GreedyPathDisplay.from_estimator(greedy)
display.figure_.suptitle("Score of each candidate of the greedy search")

# %%
# Which checkpoints matter
# ------------------------
#
# The importance of a checkpoint is the score that the soup loses when its share is given to the
# others in proportion to their coefficients. For orange bars to the left, the soup is better
# without the checkpoint on these examples.

importance = ingredient_importance(scalar, *validation)
display = IngredientImportanceDisplay.from_importance(importance)
display.ax_.set_title("Importance of each checkpoint")
print(importance)

# %%
# Learning curve and loss barriers
# --------------------------------
#
# The validation loss at every step of the search, and on straight lines between the ingredients of
# the greedy soup: there is no barrier, so they can be mixed.

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
LearningCurveDisplay.from_estimator(layerwise, ax=left)
LossBarrierDisplay.from_estimator(greedy, *validation, ax=right, n_points=7)
figure.suptitle("Learning curve, and loss between checkpoints of the greedy soup")

# %%
# A report
# --------
#
# One HTML file with all of this, readable in any browser without a network connection. Pass the
# result of ``compare_soups`` to include the comparison, and ``importance=`` to include the
# importance of each checkpoint.

with tempfile.TemporaryDirectory() as folder:
    page = Path(folder) / "soup.html"
    scalar.report(page, importance=importance)
    print(f"{page.stat().st_size / 1000:.0f} kB")
