"""Find paths that match a pattern, without following links endlessly."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from ..exceptions import CheckpointError
from .sweeps import natural_key


def matches_of(pattern: str) -> Iterator[Path]:
    """Paths that match a pattern; "**" does not follow links, which may form cycles."""
    if "**" not in pattern:
        yield from map(Path, _matches(pattern))
        return
    path = Path(pattern)
    start = Path(path.anchor) if path.anchor else Path()
    hidden = {part for part in path.parts if part[:1] == "."}
    try:
        for match in start.glob(str(path.relative_to(start)) if path.anchor else pattern):
            parts = match.parts
            if not any(part[:1] == "." and part not in hidden for part in parts if part != ".."):
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


def _matches(pattern: str) -> list[str]:
    """As `glob.glob`, but through each folder once, however many links lead to it."""
    head, tail = os.path.split(pattern)
    if glob.escape(head) == head:  # no pattern
        return glob.glob(pattern)
    folders: dict[str, str] = {}
    for match in sorted(_matches(head), key=lambda one: natural_key(Path(one))):
        folders.setdefault(os.path.realpath(match), match)
    return [
        match
        for folder in folders.values()
        for match in glob.glob(os.path.join(glob.escape(folder), tail))
    ]
