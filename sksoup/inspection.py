"""Look at soups: all systems side by side on the same data, and the loss between checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone

from ._barrier import LossBarrier, loss_barrier
from ._base import BaseSoup
from ._data import Task
from ._displays import (
    CoefficientsDisplay,
    ComparisonDisplay,
    GreedyPathDisplay,
    LearningCurveDisplay,
    LossBarrierDisplay,
)
from ._memory import LiveTensors
from .baselines import BestCheckpoint, CheckpointEnsemble, UniformSoup
from .checkpoints import CheckpointCollection
from .greedy import GreedySoup
from .learned import LearnedSoup
from .mehl import MEHLSoup

__all__ = [
    "CoefficientsDisplay",
    "ComparisonDisplay",
    "GreedyPathDisplay",
    "LearningCurveDisplay",
    "LossBarrier",
    "LossBarrierDisplay",
    "SoupComparison",
    "SoupResult",
    "compare_soups",
    "loss_barrier",
    "paper_systems",
]


@dataclass(frozen=True)
class SoupResult:
    """Hold what `compare_soups` measured of one system.

    Parameters
    ----------
    system : str
        Its name.
    held_out : float
        Score on the rows that chose the coefficients.
    test : float or None
        Score on rows that no system saw.
    seconds : float
        Wall time of `fit`.
    forward_passes : float
        Forward passes of one model over the held-out rows during `fit`.
    backward_passes : float
        Backward passes, in the same unit.
    extra_memory : float
        Peak of live tensors during `fit`, in sizes of one model: without the module itself, the
        held-out data and activations, with its gradient.
    n_ingredients : int
        Checkpoints with a coefficient other than 0.

    Examples
    --------
    >>> from sksoup.inspection import SoupResult
    >>> SoupResult("Uniform-Soup", 0.9, 0.88, 0.1, 0.0, 0.0, 1.2, 24).test
    0.88
    """

    system: str
    held_out: float
    test: float | None
    seconds: float
    forward_passes: float
    backward_passes: float
    extra_memory: float
    n_ingredients: int


@dataclass(frozen=True)
class SoupComparison:
    """Hold the results of `compare_soups`; printed, it is a table.

    Parameters
    ----------
    results : tuple of SoupResult
        One per system, in the order they were fitted.
    soups : dict of str to estimator
        The fitted systems by name.

    Examples
    --------
    >>> from sksoup.inspection import SoupComparison, SoupResult
    >>> row = SoupResult("Uniform-Soup", 0.9, 0.88, 0.1, 0.0, 0.0, 1.2, 24)
    >>> print(SoupComparison((row,), {}).to_markdown().splitlines()[2])
    | Uniform-Soup | 90.00 | 88.00 | 0.10 | 0.0 | 0.0 | 1.2 | 24 |
    """

    results: tuple[SoupResult, ...]
    soups: dict[str, BaseSoup]

    HEADER = (
        "system",
        "held-out %",
        "test %",
        "seconds",
        "forward",
        "backward",
        "extra memory",
        "ingredients",
    )

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                r.system,
                f"{100 * r.held_out:.2f}",
                "-" if r.test is None else f"{100 * r.test:.2f}",
                f"{r.seconds:.2f}",
                f"{r.forward_passes:.1f}",
                f"{r.backward_passes:.1f}",
                f"{r.extra_memory:.1f}",
                str(r.n_ingredients),
            )
            for r in self.results
        ]

    def __str__(self) -> str:
        rows = [self.HEADER, *self._cells()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.HEADER))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def to_markdown(self) -> str:
        """Return the table in Markdown.

        Returns
        -------
        table : str
            Scores in percent, passes in passes of one model over the held-out rows, memory in
            sizes of one model.
        """
        align = ["---", *["---:"] * (len(self.HEADER) - 1)]
        rows = [self.HEADER, align, *self._cells()]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paper_systems(
    n_checkpoints: int, *, task: Task = "classification", random_state: Any = 0
) -> dict[str, BaseSoup]:
    """Make the ten systems of the two papers, unfitted.

    MEHL-Soup takes a quarter of the checkpoints at a time, so that it is not HL-Soup by another
    name.

    Parameters
    ----------
    n_checkpoints : int
        K, for the model batch ``ceil(K / 4)``.
    task : {"classification", "regression", "multilabel"}, default="classification"
        What the outputs mean.
    random_state : int or None, default=0
        For those that draw at random.

    Returns
    -------
    systems : dict of str to estimator
        In the order of the papers' tables.

    References
    ----------
    Wortsman et al., arXiv:2203.05482; Li et al., arXiv:2407.03641, Table 1.

    Examples
    --------
    >>> from sksoup.inspection import paper_systems
    >>> len(paper_systems(24)), paper_systems(24)["MEHL-Soup"].model_batch_size
    (10, 6)
    """
    b = -(-n_checkpoints // 4)
    seed = {"task": task, "random_state": random_state}
    return {
        "Best checkpoint": BestCheckpoint(task=task),
        "Uniform-Soup": UniformSoup(task=task),
        "Greedy-Soup": GreedySoup(task=task),
        "Learned-Soup": LearnedSoup(**seed),
        "Learned-Soup+": LearnedSoup(layerwise=True, **seed),
        "HL-Soup": MEHLSoup(model_batch_size=None, **seed),
        "HL-Soup+": MEHLSoup(model_batch_size=None, layerwise=True, **seed),
        "MEHL-Soup": MEHLSoup(model_batch_size=b, **seed),
        "MEHL-Soup+": MEHLSoup(model_batch_size=b, layerwise=True, **seed),
        "Ensemble": CheckpointEnsemble(task=task),
    }


def compare_soups(
    checkpoints: CheckpointCollection,
    X_val: Any,
    y_val: Any,
    X_test: Any = None,
    y_test: Any = None,
    *,
    systems: Mapping[str, BaseSoup] | None = None,
    on_result: Callable[[SoupResult], None] | None = None,
) -> SoupComparison:
    """Fit several systems on the same checkpoints and held-out rows, and measure them.

    Parameters
    ----------
    checkpoints : CheckpointCollection
        What to mix.
    X_val, y_val : array-like or Tensor of n_samples rows
        Held-out rows: they choose the coefficients.
    X_test, y_test : array-like or Tensor, or None, default=None
        Rows that no system sees while fitting: they only report.
    systems : mapping of str to estimator or None, default=None
        Unfitted soups by name; they are cloned. By default the ten of `paper_systems`.
    on_result : callable or None, default=None
        Called with each `SoupResult` as soon as it is known.

    Returns
    -------
    comparison : SoupComparison
        Results and fitted systems.

    Raises
    ------
    TypeError
        ``checkpoints`` is not a collection.
    ValueError
        Only one of ``X_test`` and ``y_test`` is given; or as `fit`.

    Notes
    -----
    Every system pays its whole cost, its ranking included, so the seconds may be compared. Memory
    is counted in a second, short fit (one inner epoch), so that counting does not slow the first.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, UniformSoup
    >>> from sksoup.inspection import compare_soups
    >>> nets = CheckpointCollection([torch.nn.Linear(2, 2) for _ in range(3)])
    >>> X, y = torch.eye(2), torch.tensor([0, 1])
    >>> comparison = compare_soups(nets, X, y, systems={"mean": UniformSoup()})
    >>> [result.system for result in comparison.results]
    ['mean']
    """
    if not isinstance(checkpoints, CheckpointCollection):
        raise TypeError(
            f"checkpoints is a {type(checkpoints).__name__}, expected a CheckpointCollection: "
            f"CheckpointCollection.from_path(folder, module=build_model)."
        )
    if (X_test is None) != (y_test is None):
        raise ValueError("Give both X_test and y_test, or neither.")
    results, soups = [], {}
    for name, system in (systems or paper_systems(len(checkpoints))).items():
        soup = clone(system)
        begin = time.perf_counter()
        soup.fit(checkpoints, X_val, y_val)
        seconds = time.perf_counter() - begin
        counts, n_val = soup.counts_, len(X_val)
        result = SoupResult(
            system=name,
            held_out=soup.score(X_val, y_val),
            test=None if X_test is None else soup.score(X_test, y_test),
            seconds=seconds,
            forward_passes=counts.rows_forward / n_val,
            backward_passes=counts.rows_backward / n_val,
            extra_memory=_extra_memory(system, checkpoints, X_val, y_val),
            n_ingredients=int(np.count_nonzero(np.atleast_2d(soup.coef_).any(axis=0))),
        )
        results.append(result)
        soups[name] = soup
        if on_result is not None:
            on_result(result)
    return SoupComparison(tuple(results), soups)


def _extra_memory(system: BaseSoup, checkpoints: CheckpointCollection, X: Any, y: Any) -> float:
    """Peak of live tensors in a short fit, beyond the module and the data, in model sizes."""
    soup = clone(system)
    if "max_epochs" in soup.get_params(deep=False):
        soup.set_params(max_epochs=1)
    with LiveTensors(ignored=checkpoints.held_tensors()) as live:
        soup.fit(checkpoints, X, y)
    module = sum(p.nbytes for p in checkpoints.build_module().parameters())
    data = np.asarray(X).nbytes + np.asarray(y).nbytes
    return max(0.0, (live.peak - data - module) / checkpoints.nbytes)
