"""The results of a comparison of soups, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.tokens import TEXT_TASKS, perplexity
from ..recipes.base import BaseSoup
from ..tables import Table


@dataclass(frozen=True)
class SoupResult:
    """Hold the measurements of one system by `compare_soups`.

    Parameters
    ----------
    system : str
        Name of the system.
    held_out : float
        Score on the held-out rows, the mean over the repeats.
    test : float or None
        Score on the test rows, of several test sets on the first, the mean over the repeats.
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
        Number of fits, each with its own seed; 1 for a system that draws nothing at random.
    tests, tests_std : mapping of str to float, default={}
        Score on each test set, the mean over the repeats, and its standard deviation.

    Attributes
    ----------
    mean_shifted : float or None
        Mean score on the test sets but the first; None where there is one at most.
    worst : float or None
        Lowest score on a test set; None where there is one at most.

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
    tests: Mapping[str, float] = field(default_factory=dict)
    tests_std: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_shifted(self) -> float | None:
        shifted = list(self.tests.values())[1:]
        return statistics.mean(shifted) if shifted else None

    @property
    def worst(self) -> float | None:
        return min(self.tests.values()) if len(self.tests) > 1 else None


@dataclass(frozen=True)
class SoupComparison:
    """Hold the results of `compare_soups`; ``print`` shows them as a table.

    Parameters
    ----------
    results : tuple of SoupResult
        One per system, in the order they were fitted.
    soups : dict of str to estimator
        The fitted systems by name, of the first repeat.
    n_held_out : int or None, default=None
        Number of held-out rows.
    n_test : mapping of str to int, default={}
        Number of rows of each test set.
    scoring : str or None, default=None
        Name of the metric; None for accuracy or R², in percent, and the perplexity of language
        models (results hold its negative logarithm, greater is better).

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
    n_test: Mapping[str, int] = field(default_factory=dict)
    scoring: str | None = None

    @property
    def header(self) -> tuple[str, ...]:
        """Titles of the columns: scores are in percent unless ``scoring`` was given.

        Those of language models are perplexities.
        """
        unit = "" if self.scoring is not None else " perplexity" if self._is_text else " %"
        counts = ("seconds", "forward", "backward", "extra memory", "ingredients")
        tests = [*self.n_test, "mean shifted", "worst"] if self.is_shifted else ["test"]
        return ("system", *(f"{name}{unit}" for name in ("held-out", *tests)), *counts)

    @property
    def is_shifted(self) -> bool:
        """Whether there are several test sets."""
        return len(self.n_test) > 1

    @property
    def _is_text(self) -> bool:
        """Whether the soups are language models."""
        return any(soup.task in TEXT_TASKS for soup in self.soups.values())

    @property
    def statement(self) -> str:
        """The rows and the metric behind the scores, in a sentence or two; empty if unknown."""
        if self.n_held_out is None:
            return ""
        metric = "" if self.scoring is None else f"Scores are {self.scoring}. "
        rows = [f"{name} ({n:,} rows)" for name, n in self.n_test.items()]
        advice = "No test rows were given."
        if self.is_shifted:
            advice = (
                f"Compare systems on the test sets: {', '.join(rows)}. Mean shifted is the mean of "
                f"all but {next(iter(self.n_test))}, worst the lowest of all."
            )
        elif self.n_test:
            advice = f"Compare systems on the {next(iter(self.n_test.values())):,} test rows."
        return (
            f"{metric}Coefficients were fitted on the {self.n_held_out:,} validation rows, so "
            f"scores on them are optimistic. {advice}"
        )

    def cells(self, plus_minus: str = "±") -> list[tuple[str, ...]]:
        """Return the rows of the table as text.

        Parameters
        ----------
        plus_minus : str, default="±"
            Text between a mean and its standard deviation.

        Returns
        -------
        cells : list of tuple of str
            A tuple per system, in the order of ``header``.
        """
        factor, digits = (100, 2) if self.scoring is None else (1, 4)

        def shown(score: float | None, spread: float, n: int) -> str:
            if score is None:
                return "-"
            if self._is_text and self.scoring is None:  # its spread, to first order
                found = perplexity(score)
                text = f"{found:.3f}"
                return f"{text} {plus_minus} {found * spread:.3f}" if n > 1 else text
            text = f"{factor * score:.{digits}f}"
            return f"{text} {plus_minus} {factor * spread:.{digits}f}" if n > 1 else text

        def tested(r: SoupResult) -> list[str]:
            if not self.is_shifted:
                return [shown(r.test, r.test_std, r.n_repeats)]
            each = [shown(r.tests[name], r.tests_std[name], r.n_repeats) for name in self.n_test]
            return [*each, shown(r.mean_shifted, 0.0, 1), shown(r.worst, 0.0, 1)]

        return [
            (
                r.system,
                shown(r.held_out, r.held_out_std, r.n_repeats),
                *tested(r),
                f"{r.seconds:.2f}",
                f"{r.forward_passes:.1f}",
                f"{r.backward_passes:.1f}",
                "-" if r.extra_memory is None else f"{r.extra_memory:.1f}",
                str(r.n_ingredients),
            )
            for r in self.results
        ]

    def __str__(self) -> str:
        return f"{self._table().to_text(rule=True)}\n{self.statement}".rstrip()

    def to_markdown(self) -> str:
        """Return the table in Markdown.

        Returns
        -------
        table : str
            Scores with their standard deviation where there are repeats; passes in
            passes of one model over the held-out rows; memory in sizes of one model.
        """
        return self._table().to_markdown()

    def to_latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs.

        Returns
        -------
        table : str
            A ``tabular`` with the cells of `to_markdown`.
        """
        return self._table().to_latex()

    def to_frame(self) -> Any:
        """Return the results as a pandas DataFrame.

        Returns
        -------
        frame : DataFrame
            A row per system, a column per field of `SoupResult`; of several test sets one for each,
            and their standard deviations, ``mean_shifted`` and ``worst``.

        Raises
        ------
        ImportError
            pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install pandas.") from error
        return pd.DataFrame(map(self._record, self.results)).set_index("system")

    def _record(self, result: SoupResult) -> dict[str, Any]:
        record = asdict(result)
        tests, spreads = record.pop("tests"), record.pop("tests_std")
        if self.is_shifted:
            record |= tests | {f"{name} std": spread for name, spread in spreads.items()}
            record |= {"mean_shifted": result.mean_shifted, "worst": result.worst}
        return record

    def _table(self) -> Table:
        return Table(self.header, self.cells())
