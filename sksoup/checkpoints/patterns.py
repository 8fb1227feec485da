"""Find paths that match a pattern, without following links endlessly."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..exceptions import CheckpointError
from .sweeps import natural_key


def matches_of(pattern: str) -> Iterator[Path]:
    """Paths that match a pattern, through each folder once at each level; "**" follows no links."""
    hidden = {part for part in Path(pattern).parts if part[:1] == "."}
    try:
        for match in map(Path, _matches(pattern)):
            # glob leaves out what is hidden, but "**" does not
            odd = {part for part in match.parts if part[:1] == "." and part != ".."}
            if "**" not in pattern or odd <= hidden:
                yield match
    except ValueError as error:
        raise CheckpointError(
            f"{pattern!r} is no pattern: {error}, as in 'runs/**/*.pt'."
        ) from error
    except RecursionError as error:
        raise CheckpointError(
            f"{pattern!r} can't be searched: there are folders that are nested too deeply. Give "
            f"a pattern without '**', or list the folders."
        ) from error


def _matches(pattern: str) -> Iterable[str]:
    """The matches of a pattern, whose last part is looked for in those of the others."""
    head, tail = os.path.split(pattern)
    if glob.escape(pattern) == pattern or head == pattern:  # no pattern
        return glob.glob(pattern)
    folders: dict[str, str] = {}
    for match in sorted(_matches(head) if head else [""], key=_by_name):
        folders.setdefault(os.path.realpath(match), match)
    if "**" not in tail:
        places = (os.path.join(glob.escape(folder), tail) for folder in folders.values())
        return [match for place in places for match in glob.glob(place)]
    return [str(match) for folder in folders.values() for match in Path(folder).glob(tail)]


def _by_name(path: str) -> list[tuple[int, int, str]]:
    return natural_key(Path(path))
