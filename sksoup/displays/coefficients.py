"""Display of the coefficients of a soup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted

from .axes import BLUE, GREY, ORANGE, RED, label_ticks, new_axes, room_for


class CoefficientsDisplay:
    """Show the coefficients of a soup as a map of layers and checkpoints, or as a histogram.

    Parameters
    ----------
    coef : array-like of shape (n_checkpoints,) or (n_layers, n_checkpoints)
        Coefficients.
    checkpoint_names : sequence of str
        Names of the columns.
    layer_names : sequence of str
        Names of the rows.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    figure_ : matplotlib Figure
        Figure that contains the axes.

    References
    ----------
    Li et al., arXiv:2407.03641, Figure 1.

    Examples
    --------
    >>> from sksoup.inspection import CoefficientsDisplay
    >>> display = CoefficientsDisplay([[0.6, 0.7, -0.3]], ["a", "b", "c"], ["all"])
    >>> display.outside
    0.3333333333333333
    >>> display.plot().ax_.get_ylabel()
    'coefficient'
    """

    def __init__(
        self, coef: ArrayLike, checkpoint_names: Sequence[str], layer_names: Sequence[str]
    ) -> None:
        self.coef = np.atleast_2d(np.asarray(coef, dtype=np.float64))
        self.checkpoint_names = tuple(checkpoint_names)
        self.layer_names = tuple(layer_names)
        if self.coef.shape[1] != len(self.checkpoint_names):
            raise ValueError(
                f"coef has shape {self.coef.shape}, expected ({len(self.layer_names)}, "
                f"{len(self.checkpoint_names)}): one column per checkpoint name."
            )

    @property
    def outside(self) -> float:
        """Share of the coefficients outside [0, 1]."""
        return float(((self.coef < 0) | (self.coef > 1)).mean())

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, kind: str = "map") -> Self:
        """Show the coefficients of a fitted soup.

        Parameters
        ----------
        estimator : estimator
            A fitted soup.
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.
        kind : {"map", "histogram"}, default="map"
            As in `plot`.

        Returns
        -------
        display : CoefficientsDisplay
            The display, with its plot drawn.
        """
        check_is_fitted(estimator, "coef_")
        coef = np.atleast_2d(estimator.coef_)
        names = estimator.layer_names_ if len(coef) > 1 else ("all layers",)
        return cls(coef, estimator.checkpoints_.names, names).plot(ax=ax, kind=kind)

    def plot(self, ax: Any = None, *, kind: str = "map") -> Self:
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.
        kind : {"map", "histogram"}, default="map"
            "map" shows layers by checkpoints, with 0 in white, or bars if there is only one row.
            "histogram" shows how often each value occurs, and the fraction outside [0, 1].

        Returns
        -------
        display : CoefficientsDisplay
            This display, with ``ax_`` and ``figure_`` set.
        """
        if kind not in ("map", "histogram"):
            raise ValueError(f"kind must be 'map' or 'histogram', got {kind!r}.")
        n_layers, n = self.coef.shape
        is_map = kind == "map" and n_layers > 1
        tall = min(max(0.19 * n_layers, 1.5), 10.0) if is_map else 2.8
        tall += 0.7 if kind == "histogram" else 0.5 + room_for(self.checkpoint_names)
        wide = 6.0 if kind == "histogram" else min(max(0.22 * n + 3.5, 5.5), 15.0)
        self.figure_, self.ax_ = new_axes(ax, wide, tall)
        if kind == "histogram":
            self._histogram()
        elif is_map:
            self._map()
        else:
            self._bars()
        return self

    def _map(self) -> None:
        most = float(np.abs(self.coef).max()) or 1.0
        image = self.ax_.imshow(
            self.coef, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
        )
        self.figure_.colorbar(image, ax=self.ax_, label="coefficient", fraction=0.05, pad=0.02)
        self.ax_.set(xlabel="checkpoint", ylabel="layer")
        label_ticks(self.ax_, "x", self.checkpoint_names)
        label_ticks(self.ax_, "y", self.layer_names)

    def _bars(self) -> None:
        coef = self.coef[0]
        colors = np.where((coef < 0) | (coef > 1), RED, BLUE)
        self.ax_.bar(range(len(coef)), coef, color=colors)
        self.ax_.axhline(0, color="black", linewidth=0.8)
        self.ax_.axhline(1 / len(coef), color=GREY, linewidth=0.8, linestyle=":")
        self.ax_.set(xlabel="checkpoint", ylabel="coefficient")
        label_ticks(self.ax_, "x", self.checkpoint_names)

    def _histogram(self) -> None:
        values = self.coef.ravel()
        self.ax_.axvspan(0, 1, color=GREY, alpha=0.15, linewidth=0)
        self.ax_.hist(values, bins=min(60, max(10, len(values) // 8)), color=BLUE)
        self.ax_.axvline(1 / self.coef.shape[1], color=ORANGE, linestyle="--", label="uniform, 1/K")
        self.ax_.set(
            xlabel="coefficient", ylabel="how many",
            title=f"{100 * self.outside:.1f} % of {len(values)} outside [0, 1]",
        )  # fmt: skip
        self.ax_.legend(frameon=False)
