"""Display of the importance of the ingredients of a soup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from .axes import BLUE, ORANGE, Display, label_ticks, new_axes


class IngredientImportanceDisplay(Display):
    """Show the score that a soup loses without each of its ingredients.

    There is a bar for each ingredient, with the largest loss at the top. If the soup scores higher
    without an ingredient, its bar is orange and points to the left.

    Parameters
    ----------
    importances : mapping of str to float
        Loss in score without each ingredient, as in ``ingredient_importance(...).importances``.

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
        """Show a result of `sksoup.inspection.ingredient_importance`.

        Parameters
        ----------
        importance : IngredientImportance
            The result to show.
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.

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
