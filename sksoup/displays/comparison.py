"""Display of the scores of several systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .axes import BLUE, GREEN, GREY, ORANGE, RED, Display, label_ticks, new_axes

MARKERS, COLORS = "osD^vP*X<>ph8", (BLUE, ORANGE, GREEN, RED, GREY)


class ComparisonDisplay(Display):
    """Show the scores of several systems on the held-out rows and on test rows.

    A marker for each system and set of rows, with a bar of one standard deviation. With scores
    under distribution shift, a marker for each system instead: across the score on the test rows,
    upwards the score under shift.

    Parameters
    ----------
    systems : sequence of str
        Names of the systems.
    held_out : array-like of shape (n_systems,) or (n_systems, n_repeats)
        Scores on the held-out rows, on which the coefficients were found.
    test : array-like of the same shape, or None, default=None
        Scores on rows that were not used to find the coefficients.
    held_out_std, test_std : array-like of shape (n_systems,) or None, default=None
        Standard deviations; None for those of the repeats.
    shifted : array-like of the same shape, or None, default=None
        Scores under distribution shift, such as the mean of several test sets.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    figure_ : matplotlib Figure
        Figure that contains the axes.

    Examples
    --------
    >>> from sksoup.inspection import ComparisonDisplay
    >>> display = ComparisonDisplay(["Best", "Greedy"], [0.8, 0.9], [0.7, 0.8]).plot()
    >>> [label.get_text() for label in display.ax_.get_yticklabels()]
    ['Best', 'Greedy']
    """

    def __init__(
        self,
        systems: Sequence[str],
        held_out: ArrayLike,
        test: ArrayLike | None = None,
        *,
        held_out_std: ArrayLike | None = None,
        test_std: ArrayLike | None = None,
        shifted: ArrayLike | None = None,
    ) -> None:
        self.systems = tuple(systems)
        self.held_out = self._scores("held_out", held_out)
        self.test = None if test is None else self._scores("test", test)
        self.held_out_std = self._spread("held_out_std", held_out_std, self.held_out)
        self.test_std = None if self.test is None else self._spread("test_std", test_std, self.test)
        self.shifted = None if shifted is None else self._scores("shifted", shifted)
        if self.shifted is not None and self.test is None:
            raise ValueError("shifted is drawn against test: give both.")

    def _scores(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        scores = np.asarray(values, dtype=np.float64)
        scores = scores[:, None] if scores.ndim == 1 else scores
        if scores.ndim != 2 or len(scores) != len(self.systems):
            raise ValueError(
                f"{name} has shape {np.shape(values)}, expected a row for each of the "
                f"{len(self.systems)} systems."
            )
        return scores

    def _spread(
        self, name: str, values: ArrayLike | None, scores: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        if values is not None:
            return self._scores(name, values)[:, 0]
        return scores.std(axis=1, ddof=1) if scores.shape[1] > 1 else None

    @classmethod
    def from_comparison(cls, comparison: Any, *, ax: Any = None) -> Self:
        """Show what `sksoup.inspection.compare_soups` measured; shift, if there are several sets.

        Parameters
        ----------
        comparison : SoupComparison
            The results to show.
        ax : matplotlib Axes or None, default=None
            Axes to draw on; None for those of a new figure.

        Returns
        -------
        display : ComparisonDisplay
            The display, with its plot drawn.
        """
        results = comparison.results
        test = [result.test for result in results]
        shifted = [result.mean_shifted for result in results]
        repeated = any(result.n_repeats > 1 for result in results)
        return cls(
            [result.system for result in results],
            [result.held_out for result in results],
            None if None in test else test,
            held_out_std=[result.held_out_std for result in results] if repeated else None,
            test_std=[result.test_std for result in results] if repeated else None,
            shifted=None if None in shifted else shifted,
        ).plot(ax=ax)

    def _draw(self, ax: Any) -> None:
        if self.shifted is not None and self.test is not None:
            self._draw_shift(ax, self.test.mean(axis=1), self.shifted.mean(axis=1))
        else:
            self._draw_rows(ax)

    def _draw_shift(self, ax: Any, test: NDArray[np.float64], shifted: NDArray[np.float64]) -> None:
        """The figure of the papers: how much of a gain is one under shift, too."""
        self.figure_, self.ax_ = new_axes(ax, 7.0, 4.2)
        for i, name in enumerate(self.systems):
            self.ax_.plot(
                test[i], shifted[i], MARKERS[i % len(MARKERS)], color=COLORS[i % len(COLORS)],
                markersize=7, linestyle="none", label=name,
            )  # fmt: skip
        self.ax_.grid(alpha=0.3)
        self.ax_.set(xlabel="score on the first test set", ylabel="mean score on the shifted ones")
        self.ax_.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)

    def _draw_rows(self, ax: Any) -> None:
        n = len(self.systems)
        self.figure_, self.ax_ = new_axes(ax, 6.5, min(max(0.34 * n + 1.2, 2.6), 12.0))
        y = np.arange(n)
        drawn = [(self.held_out, self.held_out_std, "held-out rows", "o", GREY, -0.12)]
        if self.test is not None:
            drawn.append((self.test, self.test_std, "test rows", "D", BLUE, 0.12))
        for scores, spread, label, marker, color, offset in drawn:
            self.ax_.errorbar(
                scores.mean(axis=1), y + offset, xerr=spread, fmt=marker, color=color, label=label,
                markersize=5, capsize=3,
            )  # fmt: skip
        self.ax_.invert_yaxis()
        self.ax_.grid(axis="x", alpha=0.3)
        self.ax_.set(xlabel="score")
        self.ax_.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        label_ticks(self.ax_, "y", self.systems)
