"""Display of the candidates of Greedy-Soup and Pruned-Soup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from .axes import BLUE, ORANGE, RED, Display, label_ticks, new_axes, room_for


class GreedyPathDisplay(Display):
    """Show the candidates of Greedy-Soup, those that were kept, and the standard errors.

    For Pruned-Soup, show the candidates and those that were dropped.

    Parameters
    ----------
    path : list of dict
        The attribute ``path_`` of a fitted `GreedySoup` or `PrunedSoup`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    figure_ : matplotlib Figure
        Figure that contains the axes.

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
            raise ValueError("path is empty, expected the path_ of a fitted GreedySoup.")

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> Self:
        """Show the path of a fitted `GreedySoup` or `PrunedSoup`.

        Parameters
        ----------
        estimator : GreedySoup or PrunedSoup
            A fitted estimator.
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.

        Returns
        -------
        display : GreedyPathDisplay
            The display, with its plot drawn.
        """
        check_is_fitted(estimator, "path_")
        return cls(estimator.path_).plot(ax=ax)

    def _draw(self, ax: Any) -> None:
        n = len(self.path)
        names = ["all" if t["candidate"] is None else t["candidate"] for t in self.path]
        wide, tall = min(max(0.22 * n + 3.5, 5.5), 15.0), 3.6 + room_for(names)
        self.figure_, self.ax_ = new_axes(ax, wide, tall)
        scores = np.array([tried["score"] for tried in self.path])
        is_pruned = "dropped" in self.path[0]  # it starts with all of them
        changed = np.array([t["dropped" if is_pruned else "kept"] for t in self.path])
        changed[0] |= is_pruned
        bound = np.array([tried["is_bound"] for tried in self.path])
        last = np.maximum.accumulate(np.where(changed, np.arange(n), 0))  # the soup at that time
        soup, x = scores[last], np.arange(n)
        error = np.array([self.path[k]["standard_error"] or np.nan for k in last])
        if np.isfinite(error).any():
            self.ax_.fill_between(
                x, soup - error, soup + error, step="post", color=BLUE, alpha=0.15, linewidth=0,
                label="soup ± standard error",
            )  # fmt: skip
        self.ax_.step(x, soup, where="post", color=BLUE, linewidth=1.2)
        yes, no = ("dropped", "kept") if is_pruned else ("kept", "left out")
        for chosen, marker, color, label in (
            (changed & (x >= is_pruned), "o", BLUE, yes),
            (~changed & ~bound, "x", RED, no),
            (~changed & bound, "v", ORANGE, f"{no}, at most this"),
        ):
            if chosen.any():
                self.ax_.plot(x[chosen], scores[chosen], marker, color=color, label=label)
        self.ax_.set(xlabel="tried, in order", ylabel=f"held-out score with{'out' * is_pruned} it")
        self.ax_.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        label_ticks(self.ax_, "x", names)
