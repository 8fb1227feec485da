"""Display of the scores of several systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .axes import BLUE, GREEN, GREY, ORANGE, RED, Display, label_ticks, new_axes, new_panels

MARKERS, COLORS = "osD^vP*X<>ph8", (BLUE, ORANGE, GREEN, RED, GREY)


class ComparisonDisplay(Display):
    """Show the scores of several methods on validation and test data.

    A marker for each method and data set, with a bar of one standard deviation. With differences,
    a second panel shows each method's difference from the best checkpoint with its 95 % interval;
    filled where the interval is above 0, hollow where it contains 0, and a cross where it is below.
    With scores under distribution shift, a marker for each method instead: across the score on the
    first test set, upwards the mean score under shift.

    Parameters
    ----------
    systems : sequence of str
        Names of the methods.
    held_out : array-like of shape (n_systems,) or (n_systems, n_repeats)
        Scores on the validation data, on which the coefficients were found.
    test : array-like of the same shape, or None, default=None
        Scores on data that was not used to find the coefficients.
    held_out_std, test_std : array-like of shape (n_systems,) or None, default=None
        Standard deviations; None for those of the repeats.
    shifted : array-like of the same shape, or None, default=None
        Scores under distribution shift, such as the mean of several test sets.
    differences : array-like of shape (n_systems,) or None, default=None
        Differences of the test scores from that of the best checkpoint, NaN where there is none.
    intervals : array-like of shape (n_systems, 2) or None, default=None
        Their confidence intervals, NaN where there is none.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    figure_ : matplotlib Figure
        Figure that contains the axes.
    difference_ax_ : matplotlib Axes or None
        Axes of the differences, if these are drawn; None on axes that were given.

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
        differences: ArrayLike | None = None,
        intervals: ArrayLike | None = None,
    ) -> None:
        self.systems = tuple(systems)
        self.held_out = self._scores("held_out", held_out)
        self.test = None if test is None else self._scores("test", test)
        self.held_out_std = self._spread("held_out_std", held_out_std, self.held_out)
        self.test_std = None if self.test is None else self._spread("test_std", test_std, self.test)
        self.shifted = None if shifted is None else self._scores("shifted", shifted)
        if self.shifted is not None and self.test is None:
            raise ValueError("shifted is drawn against test: give both.")
        self.differences = None
        if differences is not None:
            self.differences = self._scores("differences", differences)[:, 0]
        shape = (len(self.systems), 2)
        self.intervals = np.full(shape, np.nan)
        if intervals is not None:
            if np.shape(intervals) != shape:
                raise ValueError(f"intervals has shape {np.shape(intervals)}, expected {shape}.")
            self.intervals = np.asarray(intervals, dtype=np.float64)
        self.difference_ax_: Any = None

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
        nothing = (np.nan, np.nan)
        differences = [np.nan if r.difference is None else r.difference for r in results]
        return cls(
            [result.system for result in results],
            [result.held_out for result in results],
            None if None in test else test,
            held_out_std=[result.held_out_std for result in results] if repeated else None,
            test_std=[result.test_std for result in results] if repeated else None,
            shifted=None if None in shifted else shifted,
            differences=None if np.isnan(differences).all() else differences,
            intervals=[result.difference_interval or nothing for result in results],
        ).plot(ax=ax)

    def _draw(self, ax: Any) -> None:
        if self.shifted is not None and self.test is not None:
            self._draw_shift(ax, self.test.mean(axis=1), self.shifted.mean(axis=1))
        else:
            self._draw_rows(ax)

    def _draw_shift(self, ax: Any, test: NDArray[np.float64], shifted: NDArray[np.float64]) -> None:
        """The figure of the papers: how much of a gain is one under shift, too."""
        self.figure_, self.ax_ = new_axes(ax, 7.0, max(4.2, 0.24 * len(self.systems)))
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
        tall = min(max(0.34 * n + 1.2, 2.6), 12.0)
        if ax is None and self.differences is not None:
            self.figure_, (self.ax_, self.difference_ax_) = new_panels(9.5, tall)
            self._draw_differences(self.difference_ax_, self.differences)
        else:
            self.figure_, self.ax_ = new_axes(ax, 6.5, tall)
        y = np.arange(n)
        drawn = [(self.held_out, self.held_out_std, "validation", "o", GREY, -0.15)]
        if self.test is not None:
            drawn.append((self.test, self.test_std, "test", "D", BLUE, 0.15))
        for scores, spread, label, marker, color, offset in drawn:
            self.ax_.errorbar(
                scores.mean(axis=1), y + offset, xerr=spread, fmt=marker, color=color, label=label,
                markersize=5, capsize=3, markerfacecolor="none" if marker == "o" else color,
            )  # fmt: skip
        self.ax_.set_ylim(n - 0.5, -0.5)
        self.ax_.grid(axis="x", alpha=0.3)
        self.ax_.set(xlabel="score")
        self.ax_.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        label_ticks(self.ax_, "y", self.systems)

    def _draw_differences(self, ax: Any, differences: NDArray[np.float64]) -> None:
        """A marker and an interval for each method; how it lies to 0 is its shape."""
        low, high = self.intervals.T
        kinds = (
            ("better", low > 0, "o", BLUE, BLUE),
            ("interval contains 0", ~(low > 0) & ~(high < 0), "o", GREY, "none"),
            ("worse", high < 0, "X", RED, RED),
        )
        for label, chosen, marker, color, face in kinds:
            chosen = chosen & np.isfinite(differences)
            if chosen.any():
                errors = np.nan_to_num([(differences - low)[chosen], (high - differences)[chosen]])
                ax.errorbar(
                    differences[chosen], np.flatnonzero(chosen), xerr=errors, fmt=marker,
                    color=color, markerfacecolor=face, label=label, markersize=6, capsize=3,
                )  # fmt: skip
        ax.axvline(0, color="black", linewidth=0.8)
        ax.grid(axis="x", alpha=0.3)
        ax.set(xlabel="difference from the best checkpoint (95 % interval)")
        ax.tick_params(axis="y", labelleft=False, left=False)
        ax.locator_params(axis="x", nbins=5)
        ax.legend(
            frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8,
            columnspacing=1.0, handletextpad=0.3,
        )  # fmt: skip
