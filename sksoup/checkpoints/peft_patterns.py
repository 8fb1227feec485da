"""Patterns of names in a PEFT configuration, and bounds on the time to match them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any, NoReturn

from ..exceptions import CheckpointError
from ..tables import short

# matching a pattern may take exponential time: repeats can split the letters of a name in many
# ways, repeats of a group may square that number, an optional part (not the "?" of a group or a
# lazy repeat) doubles it, and a group of alternatives multiplies it by their number
REPEATS = re.compile(r"[*+{]")
REPEATED_GROUP = re.compile(r"\)[*+{]")
OPTIONAL = re.compile(r"(?<![(*+}])\?")
# flags, names, conditions, references; characters by code, with which a class may have ranges
# that take long to compile
ODD = re.compile(r"\(\?(?![:=!]|<[=!])|\\[^\W_dDwWsSbBAZ]")
LONGEST = 500  # characters; a pattern for 80 layers has 300
LETTERS = 64  # per name; those of language models have about 50
MOST_REPEATS = 3  # such as .*language_model.*attn.*_proj
MOST_TRIES = 2e5  # for all patterns of a field
MOST_WORK = 1e8  # attempts for all patterns and modules, a few seconds
MOST_PATTERNS = 10_000  # one for each layer are about 500


def check_patterns(
    where: str, field: str, patterns: Collection[Any], most_repeats: int = 2
) -> float:
    """Raise an error for patterns that take too long; return a bound on attempts per name."""
    if len(patterns) > MOST_PATTERNS:
        refuse(where, f"its {field!r} holds {len(patterns):,} patterns, more than a network needs")
    tries = 0.0
    for pattern in patterns:
        if not isinstance(pattern, str):
            refuse(where, f"its {field!r} holds {short(pattern)}, expected strings")
        tries += _tries(pattern)
        if tries > MOST_TRIES or is_slow(pattern, most_repeats):
            refuse(
                where,
                f"its {field!r} holds {short(pattern)}, which may take too long to match. List the "
                f"names, or use at most {LONGEST} characters, {most_repeats} repeats, no repeated "
                f"groups, few alternatives, and no flags",
            )
        try:
            expression(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            refuse(
                where,
                f"its {field!r} holds {short(pattern)}, which is not a valid pattern ({error})",
            )
    return tries


def check_work(where: str, tries: float, n_modules: int, longest: int) -> None:
    """Raise an error for patterns that take too long to match with this many modules.

    ``longest`` is the number of letters of the longest name: each repeat is tried at each of them.
    """
    if tries * n_modules * max(1.0, longest / LETTERS) ** MOST_REPEATS > MOST_WORK:
        refuse(
            where,
            f"its patterns may take too long to match with {n_modules:,} modules. List the names, "
            f"or use fewer repeats, optional parts and alternatives",
        )


def expression(pattern: str) -> re.Pattern[str]:
    """Compile a pattern for module names as PEFT does."""
    return re.compile(rf"(.*\.)?({pattern})$")


def refuse(where: str, why: str) -> NoReturn:
    """Raise the error for an adapter that is not supported."""
    raise CheckpointError(
        f"{where} can't be opened as a LoRA adapter: {why}. Merge it into its base model (peft: "
        f"model.merge_and_unload()) and pass whole models instead."
    )


def is_slow(pattern: str, most_repeats: int) -> bool:
    """Whether a pattern may take long to compile or to match."""
    return (
        len(pattern) > LONGEST
        or _tries(pattern) > MOST_TRIES
        or len(REPEATS.findall(pattern)) > most_repeats
        or REPEATED_GROUP.search(pattern) is not None
        or ODD.search(pattern) is not None
        or ("[" in pattern and not pattern.isascii())
    )


def _tries(pattern: str) -> float:
    """A rough upper bound on the ways to match a pattern to a name, at most a billion."""
    bars, groups = pattern.count("|"), max(1, pattern.count("("))
    n_repeats = min(len(REPEATS.findall(pattern)), LETTERS)
    of_repeats = math.log(math.comb(LETTERS + n_repeats, n_repeats))
    of_options = len(OPTIONAL.findall(pattern)) * math.log(2)
    return math.exp(min(of_repeats + of_options + groups * math.log1p(bars / groups), 20.7))
