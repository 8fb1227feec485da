"""Find paths that match a pattern, without following links endlessly."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from ..exceptions import CheckpointError
from .read import real_path
from .sweeps import natural_key


def matches_of(pattern: str) -> Iterator[Path]:
    """Paths that match a pattern, through each folder once at each level; "**" follows no links."""
    try:
        yield from map(Path, _matches(pattern))
    except ValueError as error:
        raise CheckpointError(
            f"{pattern!r} is no pattern: {error}, as in 'runs/**/*.pt'."
        ) from error
    except RecursionError as error:
        raise CheckpointError(
            f"{pattern!r} can't be searched: there are folders that are nested too deeply. Give "
            f"a pattern without '**', or list the folders."
        ) from error


def _matches(pattern: str) -> list[str]:
    """The matches of a pattern, whose last part is looked for in those of the others."""
    head, tail = os.path.split(pattern)
    if head == pattern or (not _is_pattern(head) and "**" not in tail):
        return glob.glob(pattern)
    if tail == "**":
        return [*_folders(pattern).values()]
    if "**" in tail:
        raise ValueError("'**' can only be an entire part of a path")
    places = (os.path.join(glob.escape(folder), tail) for folder in _folders(head).values())
    return [match for place in places for match in glob.glob(place)]


def _folders(pattern: str) -> dict[str, str]:
    """The matches of a pattern by their real paths, each once; "**" leaves out hidden ones."""
    head, tail = os.path.split(pattern)
    found: dict[str, str] = {}
    if tail != "**":
        for match in sorted(_matches(pattern) if pattern else [""], key=_by_name):
            found.setdefault(real_path(match), match)
        return found
    for real, start in _folders(head).items():
        if real in found or not os.path.isdir(start or os.curdir):
            continue  # it is below another one, or may not be entered
        for below in Path(start).glob("**"):
            inner = below.relative_to(start).parts
            if not any(part.startswith(".") for part in inner):
                found[os.path.join(real, *inner)] = str(below)
    return found


def _is_pattern(path: str) -> bool:
    return glob.escape(path) != path


def _by_name(path: str) -> list[tuple[int, int, str]]:
    return natural_key(Path(path))
