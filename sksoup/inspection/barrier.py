"""The loss along straight lines between checkpoints and to their mean."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, compress, repeat
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state, check_scalar

from ..checkpoints.collection import CheckpointCollection
from ..data.outputs import Task
from ..engine.objective import Criterion, Forward, load_weights
from ..exceptions import SoupWarning
from ..mixing.mix import mix
from ..recipes.baselines import UniformSoup
from ..recipes.validation import prepare_problem, validate_rows
from ..tables import Table


@dataclass(frozen=True)
class LossBarrier:
    r"""Losses along straight lines between checkpoints, measured by `loss_barrier`.

    Parameters
    ----------
    lines : tuple of (str, str)
        Names of the two ends; ``"mean"`` is the mean of all checkpoints.
    alpha : ndarray of shape (n_points,), float64
        Positions on the lines, from 0 (the first end) to 1.
    losses : ndarray of shape (n_lines, n_points), float64
        Mean loss over the rows.

    Attributes
    ----------
    barriers : ndarray of shape (n_lines,), float64
        How far the loss rises above the straight line between the losses of both ends:
        :math:`\max_\alpha L(\alpha) - (1 - \alpha) L(0) - \alpha L(1)`. 0 or less if both ends are
        in the same basin.

    References
    ----------
    Frankle et al., *Linear mode connectivity and the lottery ticket hypothesis*, ICML 2020,
    arXiv:1912.05671, Section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from sksoup.inspection import LossBarrier
    >>> hill = LossBarrier((("a", "b"),), np.array([0, 0.5, 1]), np.array([[1.0, 4.0, 2.0]]))
    >>> hill.barriers.tolist()
    [2.5]
    """

    lines: tuple[tuple[str, str], ...]
    alpha: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def barriers(self) -> NDArray[np.float64]:
        first, last = self.losses[:, :1], self.losses[:, -1:]  # (n_lines, 1) each
        straight = first * (1 - self.alpha) + last * self.alpha
        heights: NDArray[np.float64] = (self.losses - straight).max(axis=1)
        return heights

    def __str__(self) -> str:
        lines = zip(self.lines, self.losses, self.barriers, strict=True)
        rows = [
            (f"{a} - {b}", f"{ls[0]:.4f} {ls[-1]:8.4f}", f"{ls.max():.4f}", f"{barrier:.4f}")
            for (a, b), ls, barrier in lines
        ]
        return Table(("line", "loss at ends", "highest", "barrier"), rows).to_text()


def loss_barrier(
    checkpoints: CheckpointCollection,
    X: Any,
    y: Any,
    *,
    n_points: int = 11,
    n_pairs: int | None = 10,
    forward: Forward | None = None,
    task: Task = "classification",
    criterion: Criterion | None = None,
    classes: ArrayLike | None = None,
    batch_size: int | None = 128,
    device: str | torch.device = "auto",
    random_state: Any = 0,
) -> LossBarrier:
    """Measure the loss along straight lines between checkpoints and to their mean.

    Checkpoints can be mixed if they are in the same basin, that is, if the loss does not rise
    between them.

    Parameters
    ----------
    checkpoints : CheckpointCollection
        Checkpoints with a module.
    X, y : array-like or Tensor of n_samples rows
        Held-out data.
    n_points : int, default=11
        Number of positions on each line, including the ends.
    n_pairs : int or None, default=10
        Number of pairs of checkpoints, drawn at random if there are more. None uses all K(K − 1)/2
        pairs. The K lines to the mean are always measured.
    forward : callable or None, default=None
        Function ``(module, X) -> outputs`` that runs the forward pass, as for soups.
    task : str, default="classification"
        How the outputs are interpreted: "classification", "regression", "multilabel", or
        "language-modeling" (see the page "Language models").
    criterion : class, nn.Module or callable ``(output, y) -> loss``, default=None
        Loss. By default that of the task: cross-entropy, squared error or binary cross-entropy.
        Labels equal to its ``ignore_index`` are left out.
    classes, batch_size, device
        As in `MEHLSoup`.
    random_state : int, RandomState instance or None, default=0
        Seed for drawing the pairs.

    Returns
    -------
    barrier : LossBarrier
        Losses along the lines. Print it for a table.

    Raises
    ------
    ValueError
        ``n_points`` is less than 2, or X and y do not match.
        CheckpointError
        As for `fit`.

    Warns
    -----
    SoupWarning
        The module returns probabilities instead of logits, and ``criterion`` is None.

    Notes
    -----
    Cost: ``n_points`` forward passes over the rows per line; each line reads its two ends once.
    Memory: four models.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection
    >>> from sksoup.inspection import loss_barrier
    >>> nets = CheckpointCollection([torch.nn.Linear(2, 2) for _ in range(3)])
    >>> loss_barrier(nets, torch.eye(2), torch.tensor([0, 1])).losses.shape
    (6, 11)
    """
    check_scalar(n_points, "n_points", Integral, min_val=2)
    n_all = math.comb(len(checkpoints), 2)
    takes: Iterable[bool] = repeat(True)
    if n_pairs is not None and n_pairs < n_all:
        check_scalar(n_pairs, "n_pairs", Integral, min_val=0)
        if random_state is None:  # fresh entropy instead of NumPy's global state
            random_state = int(np.random.SeedSequence().generate_state(1)[0])
        rng = check_random_state(random_state)
        drawn = {*rng.choice(n_all, n_pairs, replace=False).tolist()}
        takes = map(drawn.__contains__, range(n_all))
    pairs = [*compress(combinations(checkpoints, 2), takes)]
    alpha = np.linspace(0, 1, n_points)
    like = UniformSoup(forward=forward, task=task, batch_size=batch_size)  # accepts the same rows
    like._check_params()
    X, y, _ = validate_rows(like, X, y, task)
    problem = prepare_problem(
        checkpoints, X, y, task=task, classes=classes, criterion=criterion, forward=forward,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    if problem.doubt is not None and criterion is None:
        warnings.warn(problem.doubt, SoupWarning, stacklevel=2)
    mean = mix(checkpoints, np.full(len(checkpoints), 1 / len(checkpoints)))

    def losses(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[float]:
        """The losses along the line from a to b."""
        ends, found = CheckpointCollection([a, b]), []
        for t in alpha:
            load_weights(problem.module, mix(ends, [1 - t, t]))
            found.append(problem.objective.mean_loss(problem.data, batch_size))
        return found

    between = [losses(checkpoints[a], checkpoints[b]) for a, b in pairs]
    to_mean = [losses(checkpoints[name], mean) for name in checkpoints]
    lines = (*pairs, *((name, "mean") for name in checkpoints))
    return LossBarrier(lines, alpha, np.array([*between, *to_mean]))
