"""Is a soup better than the best checkpoint? The answer in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .units import Unit

SIGNIFICANT = 0.05
MOST_NAMES = 3  # in a list


def verdict_of_one(result: Any, unit: Unit, where: str) -> str:
    """Whether a method that was chosen beforehand is better; empty if nothing was measured."""
    if result.difference is None:
        return ""
    gain = _in_words(result, unit, signed=False)
    if result.p_value is None:
        signed = _in_words(result, unit)
        return (
            f"{result.system} differs from the best checkpoint by {signed} on {where}; there is no "
            f"interval for this metric."
        )
    if result.p_value > SIGNIFICANT:
        return (
            f"{result.system} does not differ significantly from the best checkpoint: the "
            f"difference is {_in_words(result, unit)} on {where} (95 % interval)."
        )
    which = "better" if result.difference > 0 else "worse"
    return (
        f"{result.system} is {which} than the best checkpoint by {gain} on {where} (95 % interval)."
    )


def verdict_of_all(results: Sequence[Any], unit: Unit, where: str) -> str:
    """Which of several methods are better, with Bonferroni's correction."""
    compared = [r for r in results if r.difference is not None]
    judged = sorted((r for r in compared if r.p_value is not None), key=lambda r: -r.difference)
    if len(compared) == 1:
        return verdict_of_one(compared[0], unit, where)
    if not judged:
        return "There are no intervals for this metric." if compared else ""
    n = len(judged)
    sure = [r for r in judged if n * r.p_value <= SIGNIFICANT]
    better, worse = [r for r in sure if r.difference > 0], [r for r in sure if r.difference < 0]
    first = judged[0]
    correction = f"Bonferroni's correction for {n} comparisons"
    if better:
        first, *others = better
        also = f"; so {'are' if len(others) > 1 else 'is'} {_listed(others)}" if others else ""
        said = (
            f"{first.system} is better than the best checkpoint by "
            f"{_in_words(first, unit, signed=False)} on {where} (95 % interval), also after "
            f"{correction}{also}."
        )
    else:
        after = f" after {correction}" if n > 1 and first.p_value <= SIGNIFICANT else ""
        said = (
            f"No method is significantly better than the best checkpoint on {where}{after}: the "
            f"largest difference is {_in_words(first, unit)} ({first.system}, 95 % interval)."
        )
    return f"{said} Significantly worse: {_listed(worse[::-1])}." if worse else said


def _in_words(result: Any, unit: Unit, signed: bool = True) -> str:
    """The difference of a result with its unit."""
    return unit.in_words(result.difference, result.difference_interval, result.test, signed)


def _listed(results: Sequence[Any]) -> str:
    """Names of a few methods, and how many more there are."""
    names = [r.system for r in results]
    if len(names) > MOST_NAMES:
        names = [*names[:MOST_NAMES], f"{len(names) - MOST_NAMES} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
