"""Scores between the pretrained weights and a soup (WiSE-FT)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted

from ..checkpoints.collection import CheckpointCollection
from ..displays.axes import BLUE, ORANGE, Display, new_axes
from ..engine.objective import load_weights
from ..engine.tied import check_tied
from ..mixing.mix import mix
from ..recipes.base import BaseSoup
from ..recipes.start import Start, name_of_start, with_start
from ..recipes.validation import scorer_of
from ..runtime.copies import copied
from ..tables import Table
from .test_sets import named_test_sets


@dataclass(frozen=True)
class InterpolationPath:
    """Scores between pretrained weights and a soup, measured by `interpolation_path`.

    Parameters
    ----------
    t : ndarray of shape (n_points,), float64
        Positions: 0 is the pretrained weights, 1 is the soup.
    scores : ndarray of shape (n_points,), float64
        Scores on X.
    shifted : mapping of str to ndarray of shape (n_points,), float64
        Scores on each shifted set.

    Attributes
    ----------
    best_t : float
        The position with the highest score on X; the one closest to the soup if there are ties.
    mean_shifted : ndarray of shape (n_points,) or None
        Mean score on the shifted sets. None if there are none.

    References
    ----------
    Wortsman et al., *Robust fine-tuning of zero-shot models*, CVPR 2022, arXiv:2109.01903, Fig. 1.

    Examples
    --------
    >>> import numpy as np
    >>> from sksoup.inspection import InterpolationPath
    >>> InterpolationPath(np.array([0, 0.5, 1]), np.array([0.6, 0.9, 0.8])).best_t
    0.5
    """

    t: NDArray[np.float64]
    scores: NDArray[np.float64]
    shifted: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def best_t(self) -> float:
        return float(max(self.t[self.scores == self.scores.max()], key=lambda t: -abs(1 - t)))

    @property
    def mean_shifted(self) -> NDArray[np.float64] | None:
        return np.mean(list(self.shifted.values()), axis=0) if self.shifted else None

    def __str__(self) -> str:
        mean = self.mean_shifted
        columns = {"score": self.scores, **self.shifted}
        if mean is not None:
            columns["mean shifted"] = mean
        rows = [
            (f"{t:.2f}", *(f"{scores[i]:.4f}" for scores in columns.values()))
            for i, t in enumerate(self.t)
        ]
        return Table(("t", *columns), rows).to_text()


def interpolation_path(
    start: Start,
    soup: BaseSoup,
    X: Any,
    y: Any,
    *,
    X_shifted: Mapping[str, Any] | None = None,
    y_shifted: Any = None,
    t: int | ArrayLike = 11,
    scoring: str | Callable[..., float] | None = None,
) -> InterpolationPath:
    r"""Score the weights :math:`(1 - t) w_0 + t w` between pretrained weights and a soup.

    Fine-tuning improves a model on similar data, but often makes it worse on other data than the
    pretrained model. A model between the two may be better on both; ``soup.interpolate(start, t)``
    returns it. Choose t on held-out data, not on the test data that you report.

    Parameters
    ----------
    start : str, path-like, mapping of str to Tensor, or nn.Module
        The pretrained weights :math:`w_0`, as in `ModelStockSoup`.
    soup : estimator
        A fitted soup.
    X, y : array-like or Tensor of n_samples rows
        Data for the scores, as for ``soup.score``.
    X_shifted : mapping of str to test sets, or None, default=None
        Named sets under distribution shift: inputs whose labels are ``y_shifted``, or pairs ``(X,
        y)``.
    y_shifted : array-like or Tensor, or None, default=None
        Labels of all shifted sets. None if they are pairs.
    t : int or array-like of shape (n_points,), default=11
        Number of evenly spaced positions from 0 to 1, or the positions.
    scoring : str, callable or None, default=None
        Metric, as in scikit-learn. By default that of ``soup.score``.

    Returns
    -------
    path : InterpolationPath
        Scores at all positions. Print it for a table.

    Raises
    ------
    ValueError
        There are fewer than two positions, a position is not finite, or sets and labels do not
        match.
    TypeError
        ``soup`` is an ensemble, or ``X_shifted`` is not a mapping.
    CheckpointError
        ``start`` can't be opened, or its tensors differ.

    Notes
    -----
    Cost: a forward pass over all rows for each position; ``start`` is read once. Memory: four
    models.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, UniformSoup
    >>> from sksoup.inspection import interpolation_path
    >>> nets = CheckpointCollection([torch.nn.Linear(2, 2) for _ in range(3)])
    >>> X, y = torch.eye(2), torch.tensor([0, 1])
    >>> soup = UniformSoup().fit(nets, X, y)
    >>> interpolation_path("checkpoint0", soup, X, y, t=5).t.tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    check_is_fitted(soup, "coef_")
    if not soup._has_recipe:
        raise TypeError("soup is an ensemble, which has no weights, expected a soup.")
    places = _places(t)
    if X_shifted is not None and not isinstance(X_shifted, Mapping):
        raise TypeError(
            f"X_shifted is a {type(X_shifted).__name__}, expected a mapping of names to sets."
        )
    sets = {} if X_shifted is None else named_test_sets(None, y, X_shifted, y_shifted)
    checkpoints = with_start(soup.checkpoints_, start)
    begin = name_of_start(soup.checkpoints_, start)
    check_tied(soup.module_, checkpoints.select([begin]))
    weights = {n: w for n, w in soup.state_dict().items() if n in checkpoints.layout}
    ends = CheckpointCollection([checkpoints[begin], weights])
    between = copy.copy(soup)
    between.module_ = copied(soup.module_)
    score = scorer_of(between, scoring)
    found: dict[str | None, list[float]] = {name: [] for name in (None, *sets)}
    for place in places:
        load_weights(between.module_, mix(ends, [1 - place, place]))
        for name, rows in ((None, (X, y)), *sets.items()):
            found[name].append(float(score(between, *rows)))
    arrays = {name: np.array(scores) for name, scores in found.items()}
    return InterpolationPath(places, arrays[None], {name: arrays[name] for name in sets})


def _places(t: int | ArrayLike) -> NDArray[np.float64]:
    if isinstance(t, Integral):
        check_scalar(t, "t", Integral, min_val=2)
        return np.linspace(0, 1, int(t))
    places = np.asarray(t, dtype=np.float64)
    if places.ndim != 1 or len(places) < 2 or not np.isfinite(places).all():
        raise ValueError(
            f"t must be a number of positions, or two or more finite positions, got {t!r}."
        )
    return places


class InterpolationDisplay(Display):
    """Show the scores between pretrained weights and a soup.

    With shifted sets, the mean score on them is plotted against the score on X, as in the paper;
    otherwise the score is plotted against t.

    Parameters
    ----------
    path : InterpolationPath
        Result of `sksoup.inspection.interpolation_path`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the plot.
    figure_ : matplotlib Figure
        Figure that contains the axes.

    Examples
    --------
    >>> import numpy as np
    >>> from sksoup.inspection import InterpolationDisplay, InterpolationPath
    >>> path = InterpolationPath(np.array([0, 0.5, 1]), np.array([0.6, 0.9, 0.8]))
    >>> InterpolationDisplay(path).plot().ax_.get_ylabel()
    'score'
    """

    def __init__(self, path: InterpolationPath) -> None:
        self.path = path

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: Any, *, start: Start, ax: Any = None, **kwargs: Any
    ) -> Self:
        """Measure and show the scores between pretrained weights and a fitted soup.

        Parameters
        ----------
        estimator : estimator
            A fitted soup.
        X, y : array-like or Tensor of n_samples rows
            Data for the scores.
        start : str, path-like, mapping of str to Tensor, or nn.Module
            The pretrained weights.
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.
        **kwargs : dict
            Parameters of `sksoup.inspection.interpolation_path`.

        Returns
        -------
        display : InterpolationDisplay
            The display, with its plot drawn.
        """
        return cls(interpolation_path(start, estimator, X, y, **kwargs)).plot(ax=ax)

    def _draw(self, ax: Any) -> None:
        self.figure_, self.ax_ = new_axes(ax, 5.5, 4.0)
        path, shifted = self.path, self.path.mean_shifted
        if shifted is None:
            self.ax_.plot(path.t, path.scores, "o-", color=BLUE, markersize=4)
            self.ax_.set(xlabel="t, from the start (0) to the soup (1)", ylabel="score")
            return
        self.ax_.plot(path.scores, shifted, "o-", color=BLUE, markersize=4)
        order = path.t.argsort()
        for end, label, marker in ((order[0], "start", "s"), (order[-1], "soup", "D")):
            text = f"{label} (t = {path.t[end]:g})"
            self.ax_.plot(
                path.scores[end], shifted[end], marker, color=ORANGE, markersize=8, label=text,
                linestyle="none", zorder=3,
            )  # fmt: skip
        self.ax_.set(xlabel="score", ylabel="mean score on the shifted sets")
        self.ax_.legend(frameon=False)
