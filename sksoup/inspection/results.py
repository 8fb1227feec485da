"""The results of a comparison of soups, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

from ..data.tokens import TEXT_TASKS
from ..recipes.base import BaseSoup
from ..tables import Table, notebook_html
from .units import Unit
from .verdict import verdict_of_all, verdict_of_one


@dataclass(frozen=True)
class SoupResult:
    """Hold the measurements of one method by `compare_soups`.

    Parameters
    ----------
    system : str
        Name of the method.
    held_out : float
        Score on the validation data, the mean over the repeats.
    test : float or None
        Score on the test data, of several test sets on the first, the mean over the repeats.
    seconds : float
        Wall time of `fit` with its ranking, the mean over the repeats.
    forward_passes : float
        Forward passes of one model over the validation data during `fit`, its ranking included.
    backward_passes : float
        Backward passes, in the same unit.
    extra_memory : float or None
        Peak of live tensors during `fit`, in sizes of one model: without the module itself, the
        validation data and activations, with its gradient.
    n_ingredients : int
        Checkpoints with a coefficient other than 0, in the first repeat.
    held_out_std, test_std : float, default=0.0
        Standard deviations over the repeats.
    n_repeats : int, default=1
        Number of fits, each with its own seed; 1 for a method that draws nothing at random.
    tests, tests_std : mapping of str to float, default={}
        Score on each test set, the mean over the repeats, and its standard deviation.
    difference : float or None, default=None
        ``test`` minus that of the best checkpoint; None for that itself, and without one.
    difference_interval : tuple of (float, float) or None, default=None
        Its 95 % confidence interval, paired by test example (see `compare_soups`).
    p_value : float or None, default=None
        Two-sided p-value of the difference, not corrected for the number of comparisons.
    shifted_difference : float or None, default=None
        ``mean_shifted`` minus that of the best checkpoint.
    shifted_difference_interval : tuple of (float, float) or None, default=None
        Its 95 % confidence interval.

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
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    p_value: float | None = None
    shifted_difference: float | None = None
    shifted_difference_interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        test = "" if self.test is None else f", test {self.test:.4f}"
        return f"{self.system}: validation {self.held_out:.4f}{test}, {self.seconds:.2f} s"

    @property
    def mean_shifted(self) -> float | None:
        shifted = list(self.tests.values())[1:]
        return statistics.mean(shifted) if shifted else None

    @property
    def worst(self) -> float | None:
        return min(self.tests.values()) if len(self.tests) > 1 else None


@dataclass(frozen=True, repr=False)
class SoupComparison:
    """Hold the results of `compare_soups`; ``print`` shows them as a table.

    Parameters
    ----------
    results : tuple of SoupResult
        One per method, in the order they were given.
    soups : dict of str to estimator
        The fitted methods by name, of the first repeat.
    n_held_out : int or None, default=None
        Number of validation examples.
    n_test : mapping of str to int, default={}
        Number of examples of each test set.
    scoring : str or None, default=None
        Name of the metric; None for accuracy or R², in percent, and the perplexity of language
        models (results hold its negative logarithm, greater is better).
    reference : str or None, default=None
        Name of the best checkpoint, which the others are compared with.

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
    reference: str | None = None

    @property
    def header(self) -> tuple[str, ...]:
        """Titles of the columns that hold something: scores in percent unless ``scoring`` is given.

        Those of language models are perplexities. "vs best" is the difference from the best
        checkpoint.
        """
        return tuple(title for title, _ in self._columns("±"))

    @property
    def is_shifted(self) -> bool:
        """Whether there are several test sets."""
        return len(self.n_test) > 1

    def _unit(self, plus_minus: str = "±") -> Unit:
        if self.scoring is not None:
            return Unit("plain", plus_minus)
        is_text = any(soup.task in TEXT_TASKS for soup in self.soups.values())
        return Unit("perplexity" if is_text else "percent", plus_minus)

    @property
    def verdict(self) -> str:
        """Which methods are better than the best checkpoint, in a sentence; empty if unknown.

        A method counts as better if its p-value times the number of comparisons is at most 0.05
        (Bonferroni's correction).
        """
        return verdict_of_all(self.results, self._unit(), self._on_what)

    def verdict_of(self, system: str) -> str:
        """Return whether one method is better than the best checkpoint, in a sentence.

        Parameters
        ----------
        system : str
            Name of the method. Its p-value is not corrected: it is to be chosen beforehand.

        Returns
        -------
        verdict : str
            Empty if there is no difference to judge.
        """
        (result,) = (one for one in self.results if one.system == system)
        return verdict_of_one(result, self._unit(), self._on_what)

    @property
    def _on_what(self) -> str:
        """The examples that differences are measured on."""
        name, n = next(iter(self.n_test.items()), ("", 0))
        return f"the {n:,} examples of {name}" if self.is_shifted else f"the {n:,} test examples"

    @property
    def statement(self) -> str:
        """What the scores were measured on, and the verdict; empty if unknown."""
        if self.n_held_out is None:
            return self.verdict
        metric = "" if self.scoring is None else f"Scores are {self.scoring}. "
        sets = [f"{name} ({n:,} examples)" for name, n in self.n_test.items()]
        advice = "No test data was given."
        if self.is_shifted:
            advice = (
                f"Compare methods on the test sets: {', '.join(sets)}. Mean shifted is the mean of "
                f"all but {next(iter(self.n_test))}, worst the lowest of all."
            )
        elif self.n_test:
            advice = f"Compare methods on the {next(iter(self.n_test.values())):,} test examples."
        said = (
            f"{metric}Coefficients were fitted on the {self.n_held_out:,} validation examples, so "
            f"validation scores are optimistic. {advice}"
        )
        return f"{said} {self.verdict}".rstrip()

    def cells(self, plus_minus: str = "±") -> list[tuple[str, ...]]:
        """Return the rows of the table as text.

        Parameters
        ----------
        plus_minus : str, default="±"
            Text between a mean and its standard deviation, and between a difference and half the
            width of its 95 % interval.

        Returns
        -------
        cells : list of tuple of str
            A tuple per method, in the order of ``header``.
        """
        return list(zip(*(cells for _, cells in self._columns(plus_minus)), strict=True))

    def _columns(self, plus_minus: str) -> list[tuple[str, list[str]]]:
        """Titles and cells of the columns, empty ones left out."""
        unit, results = self._unit(plus_minus), self.results

        def scored(scores: Iterable[tuple[float | None, float]]) -> list[str]:
            repeats = [r.n_repeats > 1 for r in results]
            return [
                unit.score(score, spread if repeated else None)
                for (score, spread), repeated in zip(scores, repeats, strict=True)
            ]

        scores = [("validation", scored((r.held_out, r.held_out_std) for r in results))]
        gains = [unit.difference(r.difference, r.difference_interval, r.test) for r in results]
        if self.is_shifted:
            scores += [
                (name, scored((r.tests[name], r.tests_std[name]) for r in results))
                for name in self.n_test
            ]
            scores.append(("mean shifted", [unit.score(r.mean_shifted) for r in results]))
            scores.append(("worst", [unit.score(r.worst) for r in results]))
            shifted = [
                unit.difference(r.shifted_difference, r.shifted_difference_interval, r.mean_shifted)
                for r in results
            ]
            first = next(iter(self.n_test))
            differences = [(f"{first} vs best", gains), ("shifted vs best", shifted)]
        else:
            scores.append(("test", scored((r.test, r.test_std) for r in results)))
            differences = [("vs best", gains)]
        memory = ["-" if r.extra_memory is None else f"{r.extra_memory:.1f}" for r in results]
        columns = [
            ("method", [r.system for r in results]),
            *((title + unit.suffix, cells) for title, cells in scores),
            *differences,
            ("seconds", [f"{r.seconds:.2f}" for r in results]),
            ("forward", [f"{r.forward_passes:.1f}" for r in results]),
            ("backward", [f"{r.backward_passes:.1f}" for r in results]),
            ("memory", memory),
            ("used", [str(r.n_ingredients) for r in results]),
        ]
        return [(title, cells) for title, cells in columns if {*cells} != {"-"}]

    def __str__(self) -> str:
        text = "\n".join(fill(part, 100) for part in self._parts())
        return f"{self._table().to_text(rule=True)}\n{text}".rstrip()

    def _parts(self) -> list[str]:
        """The paragraphs below the table; the verdict is one of its own."""
        about = self.statement.removesuffix(self.verdict).rstrip()
        return [part for part in (self.legend, about, self.verdict) if part]

    @property
    def legend(self) -> str:
        """What the columns hold that are not scores."""
        legend = ["seconds", "forward and backward (passes over the validation data)"]
        if "memory" in self.header:
            legend.append("memory (in models)")
        costs = f"Cost of fitting: {', '.join(legend)}. Used: checkpoints in the soup."
        if any(r.difference_interval is not None for r in self.results):
            costs = f"vs best: difference from {self.reference!r}, ± its 95 % interval. {costs}"
        return costs

    def __repr__(self) -> str:
        n, tests = len(self.results), ", ".join(f"{n:,} {name}" for name, n in self.n_test.items())
        val = "" if self.n_held_out is None else f", {self.n_held_out:,} validation examples"
        tests = f", {tests} examples" if tests else ""
        return f"SoupComparison({n} method{'s' * (n != 1)}{val}{tests})"

    def _repr_html_(self) -> str:
        return notebook_html("Comparison of soups", self._table(), self._parts())

    def to_markdown(self) -> str:
        """Return the table in Markdown.

        Returns
        -------
        table : str
            Scores with their standard deviation where there are repeats; differences from the best
            checkpoint with their 95 % interval; passes in passes of one model over the validation
            data; memory in sizes of one model.
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
            A row per method, a column per field of `SoupResult`, two per interval (``..._low`` and
            ``..._high``); of several test sets one for each, and their standard deviations,
            ``mean_shifted`` and ``worst``.

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
        for name in ("difference", "shifted_difference"):
            low, high = record.pop(f"{name}_interval") or (None, None)
            record |= {f"{name}_low": low, f"{name}_high": high}
        return record

    def _table(self) -> Table:
        return Table(self.header, self.cells())
