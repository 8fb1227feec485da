"""Greedy-Soup: keep what does not lower the held-out score [W22, Recipe 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_scalar

from ._base import BaseSoup
from ._data import Task
from ._mix import mix
from ._objective import Found, Problem, load_weights, rank

__all__ = ["GreedySoup"]


def greedy(
    order: list[int], score_of: Callable[[list[int]], float], min_improvement: float
) -> tuple[list[int], list[dict[str, Any]]]:
    """Recipe 1: try the candidates in order, keep one if the mean of the kept is not worse."""
    ingredients = [order[0]]
    best = score_of(ingredients)
    path = [{"candidate": order[0], "score": best, "kept": True}]
    for candidate in order[1:]:
        score = score_of([*ingredients, candidate])
        kept = score >= best + min_improvement
        if kept:
            ingredients, best = [*ingredients, candidate], score
        path.append({"candidate": candidate, "score": score, "kept": kept})
    return ingredients, path


def uniform_coef(ingredients: list[int], n_checkpoints: int) -> NDArray[np.float64]:
    """(1, K): equal coefficients for the ingredients."""
    coef = np.zeros((1, n_checkpoints))
    coef[0, ingredients] = 1 / len(ingredients)
    return coef


class GreedySoup(BaseSoup):
    r"""Average the checkpoints that help, found greedily on the held-out score.

    Sort the checkpoints by held-out score, best first. Try each in turn: it stays if the mean of
    those kept, :math:`w = \frac{1}{|S|} \sum_{k \in S} w_k`, scores at least as high with it as
    without. The soup scores at least as high on the held-out rows as the best checkpoint.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    scoring : str, callable or None, default=None
        As scikit-learn understands it, greater is better; by default accuracy or R², by ``task``.
    min_improvement : float, default=0.0
        How much a checkpoint must raise the held-out score to be kept; 0 keeps ties, as Recipe 1.
    task : {"classification", "regression", "multilabel"}, default="classification"
        What the outputs mean.
    classes : array-like of shape (n_outputs,) or None, default=None
        Labels in output order; by default the sorted labels in ``y`` when there are as many as
        outputs, else 0, 1, ....
    batch_size : int or None, default=128
        Rows per forward pass; None for all at once.
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/n for the n ingredients, 0 elsewhere.
    ingredients_ : tuple of str
        Names of what was kept, in the order it was.
    individual_scores_ : dict of str to float
        Held-out score of each checkpoint.
    path_ : list of dict
        What was tried: ``candidate`` (name), ``score`` of the mean with it, ``kept``.
    module_ : nn.Module
        The soup, in eval mode, on the device.
    layers_ : dict of str to int
        Row of ``coef_`` for every tensor.
    layer_names_ : tuple of str
        Names of the rows.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
    checkpoints_ : CheckpointCollection
        What was mixed.
    history_ : list of dict
        As ``path_``.
    recipe_ : Recipe
        The record that `save` writes.

    Raises
    ------
    ValueError
        ``min_improvement`` is not a finite number, at `fit`.

    See Also
    --------
    MEHLSoup : Learns the coefficients instead.

    Notes
    -----
    Cost: 2K - 1 evaluations of N rows, K when the collection knows its ``scores``. A candidate has
    exactly the values that `mix` gives, so it is mixed anew from its n files: K n / 2 reads in
    all at worst. Memory: two models.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Recipe 1.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, GreedySoup
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
    >>> for net, scale in zip(nets, [-1.0, 2.0]):
    ...     _ = net.weight.data.copy_(scale * torch.eye(2))
    >>> soup = GreedySoup(CheckpointCollection(nets)).fit(torch.eye(2), torch.tensor([0, 1]))
    >>> soup.ingredients_, soup.coef_.tolist()
    (('checkpoint1', 'checkpoint0'), [0.5, 0.5])
    """

    def __init__(
        self,
        checkpoints: Any = None,
        *,
        scoring: Any = None,
        min_improvement: float = 0.0,
        task: Task = "classification",
        classes: ArrayLike | None = None,
        batch_size: int | None = 128,
        device: str | torch.device = "auto",
    ) -> None:
        self.checkpoints = checkpoints
        self.scoring = scoring
        self.min_improvement = min_improvement
        self.task = task
        self.classes = classes
        self.batch_size = batch_size
        self.device = device

    def _check_params(self) -> None:
        super()._check_params()
        check_scalar(self.min_improvement, "min_improvement", (int, float))
        if not math.isfinite(self.min_improvement):
            raise ValueError(f"min_improvement must be finite, got {self.min_improvement!r}.")

    def _search(self, problem: Problem) -> Found:
        checkpoints = problem.checkpoints
        names, n = checkpoints.names, len(checkpoints)
        checkpoints.check()
        n_ranked = 0 if checkpoints.scores is not None else n
        with problem.progress("evaluation", n_ranked + n) as step:
            scores = rank(problem, step)

            def score_of(ingredients: list[int]) -> float:
                if len(ingredients) == 1 and n_ranked:
                    score = scores[names[ingredients[0]]]
                else:  # scores given by the user may stem from other rows or another metric
                    load_weights(problem.module, mix(checkpoints, uniform_coef(ingredients, n)))
                    score = problem.score()
                step()
                return score

            # stable: equal scores stay in collection order
            order = sorted(range(n), key=lambda k: -scores[names[k]])
            ingredients, path = greedy(order, score_of, self.min_improvement)
        path = [{**tried, "candidate": names[tried["candidate"]]} for tried in path]
        return Found(
            uniform_coef(ingredients, n),
            history=path,
            attributes={
                "individual_scores_": scores,
                "ingredients_": tuple(names[k] for k in ingredients),
                "path_": path,
            },
        )
