"""Display of the loss and score during a search by gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from .axes import BLUE, GREEN, ORANGE, RED, Display, new_axes


class LearningCurveDisplay(Display):
    """Show the held-out loss and score over the steps of a search by gradient descent.

    Shows the values of every minibatch, the mean of every epoch, and a vertical line at each change
    of the model batch.

    Parameters
    ----------
    history : list of dict
        The attribute ``history_`` of a fitted `MEHLSoup` or `LearnedSoup`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    score_ax_ : matplotlib Axes or None
        Twin axes with the scores. None for regression.
    figure_ : matplotlib Figure
        Figure that contains the axes.

    Examples
    --------
    >>> from sksoup.inspection import LearningCurveDisplay
    >>> history = [{"epoch": 0, "loss": [1.0, 0.8]}, {"epoch": 1, "loss": [0.7, 0.6]}]
    >>> LearningCurveDisplay(history).plot().ax_.get_ylabel()
    'held-out loss'
    """

    def __init__(self, history: Sequence[dict[str, Any]]) -> None:
        self.history = [record for record in history if "loss" in record]
        if not self.history:
            raise ValueError(
                "history has no losses, expected the history_ of a fitted LearnedSoup or MEHLSoup."
            )

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> Self:
        """Show the search of a fitted `MEHLSoup` or `LearnedSoup`.

        Parameters
        ----------
        estimator : MEHLSoup or LearnedSoup
            A fitted estimator.
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.

        Returns
        -------
        display : LearningCurveDisplay
            The display, with its plot drawn.
        """
        check_is_fitted(estimator, "history_")
        return cls(estimator.history_).plot(ax=ax)

    def _draw(self, ax: Any) -> None:
        self.figure_, self.ax_ = new_axes(ax, 7.0, 3.8)
        ends = np.cumsum([len(record["loss"]) for record in self.history])
        starts = ends - [len(record["loss"]) for record in self.history]
        self._curve(self.ax_, "loss", BLUE, "o-", (starts + ends - 1) / 2)
        chosen = [record.get("validation_loss", np.nan) for record in self.history]
        if not np.isnan(chosen).all():
            self.ax_.plot(
                ends - 1, chosen, "x", color=RED, markersize=5, label="loss on rows set aside"
            )
        self.score_ax_ = None
        if all("score" in record for record in self.history):
            self.score_ax_ = self.ax_.twinx()
            self.score_ax_.spines[["top", "left"]].set_visible(False)
            self._curve(self.score_ax_, "score", GREEN, "^-", (starts + ends - 1) / 2)
            self.ax_.plot([], "^-", color=GREEN, markersize=3, label="score, mean of an epoch")
            self.score_ax_.set_ylabel("held-out score")
        outers = [record.get("outer", 0) for record in self.history]
        changes = [starts[k] for k in range(1, len(outers)) if outers[k] != outers[k - 1]]
        for k, change in enumerate(changes):
            self.ax_.axvline(
                change - 0.5, color=ORANGE, linewidth=0.8, linestyle="--",
                label="next model batch" if k == 0 else None,
            )  # fmt: skip
        self.ax_.set(xlabel="step", ylabel="held-out loss")
        self.ax_.legend(
            frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize="small"
        )

    def _curve(
        self, ax: Any, what: str, color: str, marker: str, centers: NDArray[np.float64]
    ) -> None:
        """Draw every minibatch as a thin line, and the mean of each epoch."""
        steps = [np.asarray(record[what]) for record in self.history]
        ax.plot(np.concatenate(steps), color=color, linewidth=0.7, alpha=0.4)
        means = [part.mean() for part in steps]
        ax.plot(
            centers, means, marker, color=color, markersize=3, label=f"{what}, mean of an epoch"
        )
