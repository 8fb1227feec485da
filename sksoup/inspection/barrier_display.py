"""Display of the loss along straight lines between checkpoints."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ..displays.axes import BLUE, ORANGE, Display, new_axes
from .barrier import LossBarrier, loss_barrier


class LossBarrierDisplay(Display):
    """Show the loss along straight lines between checkpoints.

    Each line is shown as a curve; lines to the mean of all checkpoints are dashed.

    Parameters
    ----------
    barrier : LossBarrier
        Result of `sksoup.inspection.loss_barrier`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    figure_ : matplotlib Figure
        Figure that contains the axes.

    Examples
    --------
    >>> import numpy as np
    >>> from sksoup.inspection import LossBarrier, LossBarrierDisplay
    >>> hill = LossBarrier((("a", "b"),), np.array([0, 0.5, 1]), np.array([[1.0, 4.0, 2.0]]))
    >>> LossBarrierDisplay(hill).plot().ax_.get_ylabel()
    'loss'
    """

    def __init__(self, barrier: LossBarrier) -> None:
        self.barrier = barrier

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: Any, *, ax: Any = None, **kwargs: Any
    ) -> Self:
        """Measure and show the lines between the ingredients of a fitted soup.

        Parameters
        ----------
        estimator : estimator
            A fitted soup.
        X, y : array-like or Tensor of n_samples rows
            Data on which the loss is measured.
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.
        **kwargs : dict
            Parameters of `sksoup.inspection.loss_barrier`. By default those of the soup.

        Returns
        -------
        display : LossBarrierDisplay
            The display, with its plot drawn.
        """
        check_is_fitted(estimator, "coef_")
        coef = np.atleast_2d(estimator.coef_)
        names = [n for n, c in zip(estimator.checkpoints_, coef.T, strict=True) if c.any()]
        params = ("task", "forward", "criterion", "batch_size", "device")
        given = {name: getattr(estimator, name) for name in params if hasattr(estimator, name)}
        given |= {"classes": estimator.outputs_.classes, **kwargs}
        measured = loss_barrier(estimator.checkpoints_.select(names), X, y, **given)
        return cls(measured).plot(ax=ax)

    def _draw(self, ax: Any) -> None:
        self.figure_, self.ax_ = new_axes(ax, 6.0, 3.8)
        shown: set[str] = set()
        lines = zip(self.barrier.lines, self.barrier.losses, strict=True)
        for ends, losses in lines:
            kind = "to the mean of all" if "mean" in ends else "between two checkpoints"
            self.ax_.plot(
                self.barrier.alpha, losses, linewidth=1.0, alpha=0.7,
                color=ORANGE if "mean" in ends else BLUE,
                linestyle="--" if "mean" in ends else "-",
                label=None if kind in shown else kind,
            )  # fmt: skip
            shown.add(kind)
        highest = float(self.barrier.barriers.max())
        self.ax_.set(
            xlabel="place on the line, from one end to the other", ylabel="loss",
            title=f"highest barrier {highest:.3f}",
        )  # fmt: skip
        self.ax_.legend(frameon=False)
