"""All systems side by side on the same checkpoints and rows."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.metrics import check_scoring

from ..checkpoints.collection import CheckpointCollection
from ..data.rows import Task, parts_of
from ..exceptions import SoupWarning
from ..recipes.base import BaseSoup
from ..recipes.baselines import BestCheckpoint, CheckpointEnsemble, UniformSoup
from ..recipes.greedy import GreedySoup
from ..recipes.learned import LearnedSoup
from ..recipes.mehl import MEHLSoup
from ..runtime.live_tensors import LiveTensors


@dataclass(frozen=True)
class SoupResult:
    """Hold what `compare_soups` measured of one system.

    Parameters
    ----------
    system : str
        Its name.
    held_out : float
        Score on the rows that chose the coefficients, the mean over the repeats.
    test : float or None
        Score on rows that no system saw, the mean over the repeats.
    seconds : float
        Wall time of `fit` with its ranking, the mean over the repeats.
    forward_passes : float
        Forward passes of one model over the held-out rows during `fit`, its ranking included.
    backward_passes : float
        Backward passes, in the same unit.
    extra_memory : float or None
        Peak of live tensors during `fit`, in sizes of one model: without the module itself, the
        held-out data and activations, with its gradient.
    n_ingredients : int
        Checkpoints with a coefficient other than 0, in the first repeat.
    held_out_std, test_std : float, default=0.0
        Standard deviations over the repeats.
    n_repeats : int, default=1
        Fits with a seed each; 1 for what draws nothing at random.

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
    extra_memory: float | None
    n_ingredients: int
    held_out_std: float = 0.0
    test_std: float = 0.0
    n_repeats: int = 1


@dataclass(frozen=True)
class SoupComparison:
    """Hold the results of `compare_soups`; printed, it is a table.

    Parameters
    ----------
    results : tuple of SoupResult
        One per system, in the order they were fitted.
    soups : dict of str to estimator
        The fitted systems by name, of the first repeat.
    n_held_out, n_test : int or None, default=None
        How many rows chose, and how many reported.
    scoring : str or None, default=None
        Name of the metric; None for accuracy or R², in percent.

    Examples
    --------
    >>> from sksoup.inspection import SoupComparison, SoupResult
    >>> row = SoupResult("Uniform-Soup", 0.9, 0.88, 0.1, 0.0, 0.0, 1.2, 24)
    >>> print(SoupComparison((row,), {}).to_markdown().splitlines()[2])
    | Uniform-Soup | 90.00 | 88.00 | 0.10 | 0.0 | 0.0 | 1.2 | 24 |
    """

    results: tuple[SoupResult, ...]
    soups: dict[str, BaseSoup]
    n_held_out: int | None = None
    n_test: int | None = None
    scoring: str | None = None

    @property
    def header(self) -> tuple[str, ...]:
        """Titles of the columns: scores are in percent unless ``scoring`` was given."""
        unit = " %" if self.scoring is None else ""
        counts = ("seconds", "forward", "backward", "extra memory", "ingredients")
        return ("system", f"held-out{unit}", f"test{unit}", *counts)

    @property
    def statement(self) -> str:
        """Which rows chose the coefficients and which report, in a sentence or two."""
        if self.n_held_out is None:
            return ""
        chose = f"{self.n_held_out:,} held-out rows chose the coefficients: scores on them flatter."
        if self.scoring is not None:
            chose = f"Scores are {self.scoring}. {chose}"
        if self.n_test is None:
            return f"{chose} No test rows were given."
        return f"{chose} {self.n_test:,} test rows, which no system saw, report."

    def cells(self, plus_minus: str = "±") -> list[tuple[str, ...]]:
        """Return the rows of the table as text.

        Parameters
        ----------
        plus_minus : str, default="±"
            What stands between a mean and its standard deviation.

        Returns
        -------
        cells : list of tuple of str
            A tuple per system, in the order of ``header``.
        """
        factor, digits = (100, 2) if self.scoring is None else (1, 4)

        def shown(score: float | None, spread: float, n: int) -> str:
            if score is None:
                return "-"
            text = f"{factor * score:.{digits}f}"
            return f"{text} {plus_minus} {factor * spread:.{digits}f}" if n > 1 else text

        return [
            (
                r.system,
                shown(r.held_out, r.held_out_std, r.n_repeats),
                shown(r.test, r.test_std, r.n_repeats),
                f"{r.seconds:.2f}",
                f"{r.forward_passes:.1f}",
                f"{r.backward_passes:.1f}",
                "-" if r.extra_memory is None else f"{r.extra_memory:.1f}",
                str(r.n_ingredients),
            )
            for r in self.results
        ]

    def __str__(self) -> str:
        rows = [self.header, *self.cells()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.header))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        table = [lines[0], "-" * len(lines[0]), *lines[1:]]
        return "\n".join([*table, *([self.statement] if self.statement else [])])

    def to_markdown(self) -> str:
        """Return the table in Markdown.

        Returns
        -------
        table : str
            Scores with their standard deviation where there are repeats; passes in
            passes of one model over the held-out rows; memory in sizes of one model.
        """
        align = ["---", *["---:"] * (len(self.header) - 1)]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.header, align, *cells])

    def to_latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs.

        Returns
        -------
        table : str
            A ``tabular`` with what `to_markdown` gives.
        """
        rows = [[_escaped(cell) for cell in self.header]]
        rows += [[_escaped(cell).replace("+-", "$\\pm$") for cell in row]
                 for row in self.cells("+-")]  # fmt: skip
        lines = [" & ".join(row) + r" \\" for row in rows]
        columns = "l" + "r" * (len(self.header) - 1)
        return "\n".join(
            [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
             r"\bottomrule", r"\end{tabular}"]
        )  # fmt: skip

    def to_frame(self) -> Any:
        """Return the results as a pandas DataFrame.

        Returns
        -------
        frame : DataFrame
            A row per system, a column per field of `SoupResult`.

        Raises
        ------
        ImportError
            pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install pandas.") from error
        return pd.DataFrame([asdict(result) for result in self.results]).set_index("system")


def _escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}"}
    special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(character, character) for character in text)


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
    recipes: Mapping[str, BaseSoup] | None = None,
    scoring: str | Callable[..., float] | None = None,
    n_repeats: int = 1,
    measure_memory: bool = True,
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
    recipes : mapping of str to estimator or None, default=None
        Unfitted soups by name; they are cloned. By default the ten of `paper_systems` for
        classification; for another task give ``recipes=paper_systems(K, task=...)``.
    scoring : str, callable or None, default=None
        What the results report, as scikit-learn understands it; by default accuracy or R². What a
        recipe searches by is its own affair: ``GreedySoup(scoring=...)``, and a loss for the
        learned ones.
    n_repeats : int, default=1
        Fits of each recipe that draws at random, with the seeds ``random_state``,
        ``random_state + 1``, ... (from 0 where it has no number).
    measure_memory : bool, default=True
        Whether to count memory, in a second fit of each recipe.
    on_result : callable or None, default=None
        Called with each `SoupResult` as soon as it is known.

    Returns
    -------
    comparison : SoupComparison
        Results and fitted systems.

    Raises
    ------
    TypeError
        ``checkpoints`` is not a collection, or ``recipes`` no mapping.
    ValueError
        Only one of ``X_test`` and ``y_test`` is given; ``n_repeats`` is less than 1; or as `fit`.

    Notes
    -----
    Checkpoints are ranked once for all recipes that rank alike; its time and passes are added to
    each of them, so that seconds may be compared. Memory is counted in a second fit, so that
    counting does not slow the first: of one inner epoch where a recipe descends, else whole.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, UniformSoup
    >>> from sksoup.inspection import compare_soups
    >>> nets = CheckpointCollection([torch.nn.Linear(2, 2) for _ in range(3)])
    >>> X, y = torch.eye(2), torch.tensor([0, 1])
    >>> comparison = compare_soups(nets, X, y, recipes={"mean": UniformSoup()})
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
    if recipes is not None and not isinstance(recipes, Mapping):
        raise TypeError(
            f"recipes is a {type(recipes).__name__}, expected a mapping of names to unfitted "
            f"soups: {{'greedy': GreedySoup()}}."
        )
    if not isinstance(n_repeats, Integral) or n_repeats < 1:
        raise ValueError(f"n_repeats must be an int >= 1, got {n_repeats!r}.")
    results, soups = [], {}
    test = None if X_test is None else (X_test, y_test)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as memory:
        rankings: dict[str, tuple[float, int]] = {}
        for name, recipe in (recipes or paper_systems(len(checkpoints))).items():
            ranked, cost = _ranked(recipe, checkpoints, X_val, y_val, memory, rankings)
            soup, result = _measure(
                name, ranked, cost, n_repeats, checkpoints, (X_val, y_val), test, scoring
            )
            if measure_memory:
                memory_used = _extra_memory(ranked, checkpoints, X_val, y_val)
                result = replace(result, extra_memory=memory_used)
            if "memory" in (params := recipe.get_params(deep=False)):
                soup.set_params(memory=params["memory"])  # the shared one ends here
            results.append(result)
            soups[name] = soup
            if on_result is not None:
                on_result(result)
    n_test = None if test is None else len(y_test)
    metric = None if scoring is None else getattr(scoring, "__name__", str(scoring))
    return SoupComparison(tuple(results), soups, len(y_val), n_test, metric)


def _ranked(
    recipe: BaseSoup,
    checkpoints: CheckpointCollection,
    X: Any,
    y: Any,
    memory: str,
    rankings: dict[str, tuple[float, int]],
) -> tuple[BaseSoup, tuple[float, int]]:
    """The recipe with a memory that knows the ranking, and the seconds and rows that took.

    Recipes that do not rank all rows, or have a memory of their own, are as they were.
    """
    params = recipe.get_params(deep=False)
    ranks = isinstance(recipe, (BestCheckpoint, GreedySoup))
    if not ranks or params["memory"] is not None or params.get("ranking_fraction") is not None:
        return clone(recipe), (0.0, 0)
    names = BestCheckpoint().get_params(deep=False)
    shared = {name: params[name] for name in names if name not in ("checkpoints", "memory")}
    if (key := repr(shared)) not in rankings:
        begin = time.perf_counter()
        best = BestCheckpoint(memory=memory, **shared).fit(checkpoints, X, y)
        rankings[key] = (time.perf_counter() - begin, best.counts_.rows_forward)
    return clone(recipe).set_params(memory=memory), rankings[key]


def _measure(
    name: str,
    recipe: BaseSoup,
    ranking: tuple[float, int],
    n_repeats: int,
    checkpoints: CheckpointCollection,
    val: tuple[Any, Any],
    test: tuple[Any, Any] | None,
    scoring: Any,
) -> tuple[BaseSoup, SoupResult]:
    """Fit a recipe as often as asked; the first soup, and the means."""
    params = recipe.get_params(deep=False)
    seed = params.get("random_state", "none is drawn")
    ranks_all = isinstance(recipe, GreedySoup) and recipe.ranking_fraction is None
    is_random = seed != "none is drawn" and not ranks_all
    fits = []
    for repeat in range(n_repeats if is_random else 1):
        soup = clone(recipe)
        if is_random and n_repeats > 1:
            soup.set_params(random_state=(int(seed) if isinstance(seed, Integral) else 0) + repeat)
        begin = time.perf_counter()
        soup.fit(checkpoints, *val)
        seconds = time.perf_counter() - begin + ranking[0]
        score = check_scoring(soup, scoring)
        scores = score(soup, *val), None if test is None else score(soup, *test)
        fits.append((soup, seconds, *scores))
    soups, times, held_out, tested = zip(*fits, strict=True)
    first, n = soups[0], len(val[1])
    return first, SoupResult(
        system=name,
        held_out=statistics.mean(held_out),
        test=None if test is None else statistics.mean(tested),
        seconds=statistics.mean(times),
        forward_passes=(first.counts_.rows_forward + ranking[1]) / n,
        backward_passes=first.counts_.rows_backward / n,
        extra_memory=None,
        n_ingredients=int(np.count_nonzero(np.atleast_2d(first.coef_).any(axis=0))),
        held_out_std=statistics.stdev(held_out) if len(fits) > 1 else 0.0,
        test_std=statistics.stdev(tested) if test is not None and len(fits) > 1 else 0.0,
        n_repeats=len(fits),
    )


def _extra_memory(system: BaseSoup, checkpoints: CheckpointCollection, X: Any, y: Any) -> float:
    """Peak of live tensors in a short fit, beyond the module and the data, in model sizes."""
    soup = clone(system)
    if "memory" in soup.get_params(deep=False):
        soup.set_params(memory=None)
    if "max_epochs" in soup.get_params(deep=False):
        soup.set_params(max_epochs=1)
    with LiveTensors(ignored=checkpoints.held_tensors()) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)  # the first fit has said it
        soup.fit(checkpoints, X, y)
    module = sum(p.nbytes for p in checkpoints.build_module().parameters())
    rows = [p if isinstance(p, torch.Tensor) else np.asarray(p) for p in (*parts_of(X), y)]
    data = sum(part.nbytes for part in rows)
    return max(0.0, (live.peak - data - module) / checkpoints.nbytes)
