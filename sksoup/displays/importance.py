"""Display of which ingredients of a soup matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from .axes import BLUE, ORANGE, Display, label_ticks, new_axes


class IngredientImportanceDisplay(Display):
    """Show the score that a soup loses without each of its ingredients.

    A bar for each ingredient, the largest loss at the top; those without which the soup scores
    higher point to the left, in orange.

    Parameters
    ----------
    importances : mapping of str to float
        Score that is lost without each ingredient, as ``ingredient_importance(...).importances``.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    figure_ : matplotlib Figure
        Figure that contains the axes.

    Examples
    --------
    >>> from sksoup.inspection import IngredientImportanceDisplay
    >>> display = IngredientImportanceDisplay({"a": 0.02, "b": -0.01}).plot()
    >>> [label.get_text() for label in display.ax_.get_yticklabels()]
    ['a', 'b']
    """

    def __init__(self, importances: Mapping[str, float]) -> None:
        self.importances = dict(importances)

    @classmethod
    def from_importance(cls, importance: Any, *, ax: Any = None) -> Self:
        """Show what `sksoup.inspection.ingredient_importance` measured.

        Parameters
        ----------
        importance : IngredientImportance
            The result to show.
        ax : matplotlib Axes or None, default=None
            Axes to draw on; None for those of a new figure.

        Returns
        -------
        display : IngredientImportanceDisplay
            The display, with its plot drawn.
        """
        return cls(importance.importances).plot(ax=ax)

    def _draw(self, ax: Any) -> None:
        names, lost = list(self.importances), np.array([*self.importances.values()])
        self.figure_, self.ax_ = new_axes(ax, 6.5, min(max(0.24 * len(names) + 1.0, 2.0), 12.0))
        colors = np.where(lost < 0, ORANGE, BLUE)
        self.ax_.barh(range(len(names)), lost, color=colors)
        self.ax_.axvline(0, color="black", linewidth=0.8)
        self.ax_.invert_yaxis()
        self.ax_.grid(axis="x", alpha=0.3)
        self.ax_.set(xlabel="score lost without it", ylabel="ingredient")
        label_ticks(self.ax_, "y", names)
