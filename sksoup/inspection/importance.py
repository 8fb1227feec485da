"""Importance of the ingredients of a soup: the loss in score without each of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from ..checkpoints.collection import CheckpointCollection
from ..engine.objective import load_weights
from ..mixing.mix import Sum, accumulate, cast
from ..mixing.running_mean import largest
from ..recipes.base import BaseSoup
from ..recipes.baselines import CheckpointEnsemble
from ..recipes.validation import scorer_of, validate_rows
from ..runtime.copies import copied
from ..tables import Table

MOST_LOST = 1000  # sizes of the result; what is subtracted leaves its rounding in it


@dataclass(frozen=True)
class IngredientImportance:
    """Result of `ingredient_importance`. Print it for a table.

    Parameters
    ----------
    score : float
        Score of the soup.
    scores : dict of str to float
        Score of the soup without each ingredient, in the order of the collection.
    coef : dict of str to float
        Mean coefficient of each ingredient.
    n_rows : int
        Number of rows on which the scores were measured.
    scoring : str or None, default=None
        Name of the metric. None is accuracy or R².

    Attributes
    ----------
    importances : dict of str to float
        Loss in score without each ingredient, largest first. Negative if the soup scores higher
        without it.

    Examples
    --------
    >>> from sksoup.inspection import IngredientImportance
    >>> found = IngredientImportance(0.75, {"a": 0.75, "b": 0.5}, {"a": 0.5, "b": 0.5}, 40)
    >>> found.importances
    {'b': 0.25, 'a': 0.0}
    """

    score: float
    scores: dict[str, float]
    coef: dict[str, float]
    n_rows: int
    scoring: str | None = None

    @property
    def importances(self) -> dict[str, float]:
        lost = {name: self.score - score for name, score in self.scores.items()}
        return dict(sorted(lost.items(), key=lambda item: -item[1]))

    @property
    def header(self) -> tuple[str, ...]:
        """Titles of the columns."""
        return ("ingredient", "mean coefficient", "score without it", "lost")

    @property
    def statement(self) -> str:
        """A sentence on the rows and the metric."""
        metric = "" if self.scoring is None else f" ({self.scoring})"
        return f"The soup scores {self.score:.4f}{metric} on these {self.n_rows:,} rows."

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of the table as text, largest loss first.

        Returns
        -------
        cells : list of tuple of str
            One tuple per ingredient, with cells in the order of ``header``.
        """
        return [
            (name, f"{self.coef[name]:.4f}", f"{self.scores[name]:.4f}", f"{lost:+.4f}")
            for name, lost in self.importances.items()
        ]

    def __str__(self) -> str:
        return f"{self._table().to_text(rule=True)}\n{self.statement}"

    def to_markdown(self) -> str:
        """Return the table in Markdown.

        Returns
        -------
        table : str
            One row per ingredient, largest loss first.
        """
        return self._table().to_markdown()

    def _table(self) -> Table:
        return Table(self.header, self.cells())


def ingredient_importance(
    soup: BaseSoup, X: Any, y: Any = None, *, scoring: Any = None
) -> IngredientImportance:
    r"""Measure the score that a soup loses without each of its ingredients.

    The coefficient of an ingredient is distributed over the others. In every layer, the soup
    without ingredient k has the coefficients

    .. math:: c'_k = 0, \qquad c'_j = c_j + c_k \frac{p_j}{\sum_{i \ne k} p_i}, \qquad p_j = |c_j|

    so each of the others gets a part of :math:`c_k` in proportion to the absolute value of its own
    coefficient, and rows still sum to 1. For coefficients in [0, 1] this divides the others by
    :math:`1 - c_k`, but unlike that quotient it is defined for any coefficients. In a layer that
    uses only k, all other ingredients get equal parts: :math:`p_j = 1`.

    Parameters
    ----------
    soup : estimator
        A fitted soup with two or more ingredients. Its checkpoints are read again.
    X : array-like or Tensor of shape (n_samples, ...), dict, tuple, Dataset or DataLoader
        Data for the scores, as in `fit`: the held-out data or, better, test data.
    y : array-like or Tensor of shape (n_samples,) or (n_samples, n_outputs), default=None
        Labels or targets. None, or the name of a key, if the batches contain them.
    scoring : str, callable or None, default=None
        A scikit-learn scorer (greater is better). By default accuracy or R².

    Returns
    -------
    importance : IngredientImportance
        Scores and losses in score, for each checkpoint with a coefficient other than 0. Print it
        for a table.

    Raises
    ------
    TypeError
        ``soup`` is not a soup but an ensemble, which has no weights, or a search.
    ValueError
        The soup has only one ingredient, or X and y do not match.
    CheckpointError
        A checkpoint changed or is missing.

    See Also
    --------
    IngredientImportanceDisplay : Plot the result.

    Notes
    -----
    The importance of an ingredient depends on the others: two similar ingredients can replace each
    other, so neither is important alone. Differences of less than about :math:`1/\sqrt{n}` on n
    rows may be due to chance.

    The soup without k is linear in two sums and :math:`w_k`: with :math:`P = \sum_j p_j w_j` and
    :math:`a = c_k / \sum_{i \ne k} p_i` it is :math:`w + a P - (c_k + a p_k) w_k`. Therefore each
    file is read only twice, once for the sums and once to be left out. The weights equal those of
    `mix` with the changed coefficients up to rounding; a tensor that is so large in an ingredient
    that the others are lost in it is read again from the others. Integer tensors, re-estimated
    BatchNorm statistics and tensors that are equal in all ingredients are those of the soup.

    Cost: K + 1 evaluations of the rows. Memory: four models (two sums, the module and the loaded
    checkpoint) and one tensor.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, UniformSoup
    >>> from sksoup.inspection import ingredient_importance
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
    >>> for net, scale in zip(nets, [-1.0, 2.0]):
    ...     _ = net.weight.data.copy_(scale * torch.eye(2))
    >>> X, y = torch.eye(2), torch.tensor([0, 1])
    >>> soup = UniformSoup(CheckpointCollection(nets)).fit(X, y)
    >>> ingredient_importance(soup, X, y).importances
    {'checkpoint1': 1.0, 'checkpoint0': 0.0}
    """
    if not isinstance(soup, BaseSoup) or isinstance(soup, CheckpointEnsemble):
        raise TypeError(
            f"soup is a {type(soup).__name__}, expected a fitted soup, such as a GreedySoup, whose "
            f"ingredients can be mixed again. For a SoupSearchCV pass its soup_."
        )
    check_is_fitted(soup, "module_")
    checkpoints, coef = soup.checkpoints_, np.atleast_2d(soup.coef_)
    used = [name for name, c in zip(checkpoints, coef.T, strict=True) if c.any()]
    if len(used) < 2:
        raise ValueError(
            f"The soup has only one ingredient, {used[0]!r}, so it can't be left out, expected two "
            f"or more. Fit a soup that mixes several checkpoints."
        )
    trial = copy.copy(soup)  # with a module of its own
    X, y, _ = validate_rows(trial, X, y, soup.task)
    scorer = scorer_of(trial, scoring)
    trial.module_ = copied(soup.module_)
    score = float(scorer(trial, X, y))
    scores, without = {}, Without(soup)
    for name in used:
        load_weights(trial.module_, without(name))
        scores[name] = float(scorer(trial, X, y))
    means = dict(zip(checkpoints, coef.mean(axis=0).tolist(), strict=True))
    metric = None if scoring is None else getattr(scoring, "__name__", str(scoring))
    return IngredientImportance(score, scores, {n: means[n] for n in used}, len(y), metric)


class Without:
    """The weights of a soup without an ingredient, from sums that are computed once."""

    def __init__(self, soup: BaseSoup) -> None:
        self.checkpoints: CheckpointCollection = soup.checkpoints_
        self.coef = np.atleast_2d(soup.coef_)  # (n_layers, K)
        self.parts = parts_of_rest(self.coef)
        self.rows: Mapping[str, int] = soup.layers_
        dtypes = {
            name: dtype
            for name, dtype in soup._dtypes.items()
            if dtype.is_floating_point and name not in soup.recalibrated_
        }
        self.sums: dict[str, Sum] = {}  # w
        self.others: dict[str, Sum] = {}  # P
        for k, checkpoint in enumerate(self.checkpoints):
            if not self.coef[:, k].any():
                continue
            with self.checkpoints.open(checkpoint) as read:
                for name, dtype in dtypes.items():
                    value = read(name)
                    for sums, by in ((self.sums, self.coef), (self.others, self.parts)):
                        c = float(by[self.rows[name], k])
                        if name in sums:
                            sums[name].add(value, c)
                        else:
                            sums[name] = Sum(value, c, dtype)
        # those that all share, which may be infinite, are the same without any of them
        self.dtypes = {name: dtype for name, dtype in dtypes.items() if self.sums[name].differs}

    def __call__(self, checkpoint: str) -> dict[str, torch.Tensor]:
        """The floating tensors that differ between checkpoints, in the dtypes of the soup."""
        k = self.checkpoints.names.index(checkpoint)
        c, p = self.coef[:, k], self.parts[:, k]
        a = c / np.delete(self.parts, k, axis=1).sum(axis=1)  # (n_layers,)
        b = c + a * p
        weights: dict[str, torch.Tensor] = {}
        lost: list[str] = []  # tensors of which only rounding is left
        with self.checkpoints.open(checkpoint) as read:
            for name, dtype in self.dtypes.items():
                row, total = self.rows[name], self.sums[name]
                value = total.value + self.others[name].value * float(a[row])
                left_out = read(name).to(total.dtype) * float(b[row])
                value -= left_out
                weights[name] = cast(name, value, dtype)
                if largest(left_out) > MOST_LOST * largest(weights[name].to(total.dtype)):
                    lost.append(name)
        if lost:
            coef = self.coef + a[:, None] * self.parts
            coef[:, k] = 0
            sums, _ = accumulate(self.checkpoints, coef, self.rows, lost)
            weights |= {name: cast(name, sums[name], self.dtypes[name]) for name in lost}
        return weights


def parts_of_rest(coef: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_layers, K), p: the proportions in which a coefficient is distributed."""
    parts = np.abs(coef)
    alone = np.count_nonzero(coef, axis=1) < 2
    parts[alone] = coef.any(axis=0)  # equal parts for all that are used in any layer
    return parts
