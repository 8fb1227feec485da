"""Pictures of soups, in scikit-learn's Display convention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted

# Okabe and Ito's colours, which colour-blind people can tell apart
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"
SEPARATED = re.compile(r".*[/._-]")  # up to the last separator
INCHES_PER_LABEL = 0.17
LONGEST_LABEL = 28  # characters


class CoefficientsDisplay:
    """Show the coefficients of a soup, layer by checkpoint, or how they are distributed.

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
        What was drawn on.
    figure_ : matplotlib Figure
        The figure it is in.

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
                f"{len(self.checkpoint_names)}): a column for every checkpoint name."
            )

    @property
    def outside(self) -> float:
        """Share of the coefficients that lie outside [0, 1]."""
        return float(((self.coef < 0) | (self.coef > 1)).mean())

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, kind: str = "map") -> Self:
        """Show the coefficients of a fitted soup.

        Parameters
        ----------
        estimator : estimator
            A fitted soup.
        ax : matplotlib Axes or None, default=None
            Where to draw; by default a new figure.
        kind : {"map", "histogram"}, default="map"
            As in `plot`.

        Returns
        -------
        display : CoefficientsDisplay
            Drawn.
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
            Where to draw; by default a new figure.
        kind : {"map", "histogram"}, default="map"
            Layers by checkpoints, 0 in white (bars where there is one row); or how often each
            value occurs, with the share outside [0, 1].

        Returns
        -------
        display : CoefficientsDisplay
            This one, with ``ax_`` and ``figure_``.
        """
        if kind not in ("map", "histogram"):
            raise ValueError(f"kind must be 'map' or 'histogram', got {kind!r}.")
        n_layers, n = self.coef.shape
        is_map = kind == "map" and n_layers > 1
        tall = min(max(0.19 * n_layers, 1.5), 10.0) if is_map else 2.8
        tall += 0.7 if kind == "histogram" else 0.5 + _room_for(self.checkpoint_names)
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
        _label(self.ax_, "x", self.checkpoint_names)
        _label(self.ax_, "y", self.layer_names)

    def _bars(self) -> None:
        coef = self.coef[0]
        colors = np.where((coef < 0) | (coef > 1), RED, BLUE)
        self.ax_.bar(range(len(coef)), coef, color=colors)
        self.ax_.axhline(0, color="black", linewidth=0.8)
        self.ax_.axhline(1 / len(coef), color=GREY, linewidth=0.8, linestyle=":")
        self.ax_.set(xlabel="checkpoint", ylabel="coefficient")
        _label(self.ax_, "x", self.checkpoint_names)

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


class GreedyPathDisplay:
    """Show what Greedy-Soup tried, what it kept, and how far luck goes.

    Parameters
    ----------
    path : list of dict
        As ``GreedySoup().path_``.

    Attributes
    ----------
    ax_ : matplotlib Axes
        What was drawn on.
    figure_ : matplotlib Figure
        The figure it is in.

    Examples
    --------
    >>> from sksoup.inspection import GreedyPathDisplay
    >>> tried = {"is_bound": False, "standard_error": 0.01}
    >>> path = [
    ...     {"candidate": "a", "score": 0.8, "kept": True, **tried},
    ...     {"candidate": "b", "score": 0.7, "kept": False, **tried},
    ... ]
    >>> GreedyPathDisplay(path).plot().ax_.get_xlabel()
    'tried, in order'
    """

    def __init__(self, path: Sequence[dict[str, Any]]) -> None:
        self.path = list(path)
        if not self.path:
            raise ValueError("path is empty, expected what GreedySoup tried.")

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> Self:
        """Show the path of a fitted `GreedySoup`.

        Parameters
        ----------
        estimator : GreedySoup
            Fitted.
        ax : matplotlib Axes or None, default=None
            Where to draw; by default a new figure.

        Returns
        -------
        display : GreedyPathDisplay
            Drawn.
        """
        check_is_fitted(estimator, "path_")
        return cls(estimator.path_).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw scores, the soup's as a line with a band of one standard error.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; by default a new figure.

        Returns
        -------
        display : GreedyPathDisplay
            This one, with ``ax_`` and ``figure_``.
        """
        n = len(self.path)
        names = [tried["candidate"] for tried in self.path]
        wide, tall = min(max(0.22 * n + 3.5, 5.5), 15.0), 3.6 + _room_for(names)
        self.figure_, self.ax_ = new_axes(ax, wide, tall)
        scores = np.array([tried["score"] for tried in self.path])
        kept = np.array([tried["kept"] for tried in self.path])
        bound = np.array([tried["is_bound"] for tried in self.path])
        last = np.maximum.accumulate(np.where(kept, np.arange(n), 0))  # the soup at that time
        soup, x = scores[last], np.arange(n)
        error = np.array([self.path[k]["standard_error"] or np.nan for k in last])
        if np.isfinite(error).any():
            self.ax_.fill_between(
                x, soup - error, soup + error, step="post", color=BLUE, alpha=0.15, linewidth=0,
                label="soup ± standard error",
            )  # fmt: skip
        self.ax_.step(x, soup, where="post", color=BLUE, linewidth=1.2)
        for chosen, marker, color, label in (
            (kept, "o", BLUE, "kept"),
            (~kept & ~bound, "x", RED, "left out"),
            (~kept & bound, "v", ORANGE, "left out, at most this"),
        ):
            if chosen.any():
                self.ax_.plot(x[chosen], scores[chosen], marker, color=color, label=label)
        self.ax_.set(xlabel="tried, in order", ylabel="held-out score with it")
        self.ax_.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        _label(self.ax_, "x", names)
        return self


class LearningCurveDisplay:
    """Show the held-out loss and score over the steps of a search by gradient descent.

    Parameters
    ----------
    history : list of dict
        As ``MEHLSoup().history_`` or ``LearnedSoup().history_``.

    Attributes
    ----------
    ax_ : matplotlib Axes
        What was drawn on.
    score_ax_ : matplotlib Axes or None
        Its twin for the scores; None for a regression.
    figure_ : matplotlib Figure
        The figure it is in.

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
                "history holds no losses: only LearnedSoup and MEHLSoup descend on one."
            )

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> Self:
        """Show the search of a fitted `MEHLSoup` or `LearnedSoup`.

        Parameters
        ----------
        estimator : MEHLSoup or LearnedSoup
            Fitted.
        ax : matplotlib Axes or None, default=None
            Where to draw; by default a new figure.

        Returns
        -------
        display : LearningCurveDisplay
            Drawn.
        """
        check_is_fitted(estimator, "history_")
        return cls(estimator.history_).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw loss and score of every minibatch, their means, and where model batches change.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; by default a new figure.

        Returns
        -------
        display : LearningCurveDisplay
            This one, with ``ax_`` and ``figure_``.
        """
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
        return self

    def _curve(
        self, ax: Any, what: str, color: str, marker: str, centers: NDArray[np.float64]
    ) -> None:
        """Every minibatch, thin, and the mean of each epoch."""
        steps = [np.asarray(record[what]) for record in self.history]
        ax.plot(np.concatenate(steps), color=color, linewidth=0.7, alpha=0.4)
        means = [part.mean() for part in steps]
        ax.plot(
            centers, means, marker, color=color, markersize=3, label=f"{what}, mean of an epoch"
        )


class ComparisonDisplay:
    """Show how well several systems do, on the rows that chose and on those that report.

    Parameters
    ----------
    systems : sequence of str
        Their names.
    held_out : array-like of shape (n_systems,) or (n_systems, n_repeats)
        Scores on the rows that chose the coefficients.
    test : array-like of the same shape, or None, default=None
        Scores on rows that no system saw.
    held_out_std, test_std : array-like of shape (n_systems,) or None, default=None
        Standard deviations; by default those of the repeats.

    Attributes
    ----------
    ax_ : matplotlib Axes
        What was drawn on.
    figure_ : matplotlib Figure
        The figure it is in.

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
    ) -> None:
        self.systems = tuple(systems)
        self.held_out = self._scores("held_out", held_out)
        self.test = None if test is None else self._scores("test", test)
        self.held_out_std = self._spread("held_out_std", held_out_std, self.held_out)
        self.test_std = None if self.test is None else self._spread("test_std", test_std, self.test)

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
        """Show what `sksoup.inspection.compare_soups` measured.

        Parameters
        ----------
        comparison : SoupComparison
            Its results.
        ax : matplotlib Axes or None, default=None
            Where to draw; by default a new figure.

        Returns
        -------
        display : ComparisonDisplay
            Drawn.
        """
        results = comparison.results
        test = [result.test for result in results]
        repeated = any(result.n_repeats > 1 for result in results)
        return cls(
            [result.system for result in results],
            [result.held_out for result in results],
            None if None in test else test,
            held_out_std=[result.held_out_std for result in results] if repeated else None,
            test_std=[result.test_std for result in results] if repeated else None,
        ).plot(ax=ax)

    def plot(self, ax: Any = None) -> Self:
        """Draw a dot per system and kind of rows, with a bar of one standard deviation.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; by default a new figure.

        Returns
        -------
        display : ComparisonDisplay
            This one, with ``ax_`` and ``figure_``.
        """
        n = len(self.systems)
        self.figure_, self.ax_ = new_axes(ax, 6.5, min(max(0.34 * n + 1.2, 2.6), 12.0))
        y = np.arange(n)
        chose = "held-out rows, which chose"
        drawn = [(self.held_out, self.held_out_std, chose, "o", GREY, -0.12)]
        if self.test is not None:
            drawn.append((self.test, self.test_std, "test rows, which report", "D", BLUE, 0.12))
        for scores, spread, label, marker, color, offset in drawn:
            self.ax_.errorbar(
                scores.mean(axis=1), y + offset, xerr=spread, fmt=marker, color=color, label=label,
                markersize=5, capsize=3,
            )  # fmt: skip
        self.ax_.invert_yaxis()
        self.ax_.grid(axis="x", alpha=0.3)
        self.ax_.set(xlabel="score")
        self.ax_.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        _label(self.ax_, "y", self.systems)
        return self


def new_axes(ax: Any, wide: float, tall: float) -> tuple[Any, Any]:
    """The figure and axes to draw on; new ones where none are given."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install matplotlib, or the extra sksoup[plot]."
        ) from error
    if ax is not None:
        return ax.figure, ax
    return plt.subplots(figsize=(wide, tall), layout="constrained")


def _label(ax: Any, which: str, names: Sequence[str]) -> None:
    """Label as many ticks as there is room for, evenly."""
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    room = box.width if which == "x" else box.height
    step = max(1, int(np.ceil(len(names) * INCHES_PER_LABEL / max(room, 0.1))))
    texts = shortened(names)[::step]
    ticks = range(0, len(names), step)
    if which == "x":
        ax.set_xticks(ticks, texts, rotation=90, fontsize=8, parse_math=False)
    else:
        ax.set_yticks(ticks, texts, fontsize=8, parse_math=False)


def shortened(names: Sequence[str]) -> list[str]:
    """Names without what they all begin or end with, up to a separator; the middle of long ones."""
    start = SEPARATED.match(commonprefix(list(names)))  # noqa: RUF071 - of characters
    end = SEPARATED.match(commonprefix([name[::-1] for name in names]))  # noqa: RUF071
    cut = slice(start.end() if start else 0, -end.end() if end else None)
    short = [name[cut] for name in names]
    if len(names) < 2 or not all(short):
        short = list(names)
    return [
        text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL // 2]}…{text[-13:]}"
        for text in short
    ]


def _room_for(names: Sequence[str]) -> float:
    """Inches that rotated labels take below the axes."""
    return 0.075 * max(map(len, shortened(names)))
