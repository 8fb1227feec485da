"""Explain why nothing was found at a path, and suggest another one."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from ..exceptions import CheckpointError
from .folders import is_weights
from .patterns import matches_of

MOST_FOLDERS = 1000  # searched for a suggestion


def nothing_at(path: str, suffixes: Collection[str]) -> CheckpointError:
    """The error for a path or pattern without checkpoints, with a suggestion."""
    full = Path(os.path.expanduser(path))
    return CheckpointError(f"No checkpoints found at {path!r}: {_why(full, suffixes)}")


def _why(path: Path, suffixes: Collection[str]) -> str:
    expected = f"expected {', '.join(suffixes)} files, or folders with weights and a config.json"
    if path.is_dir():
        deeper = _pattern_below(path, suffixes)
        remedy = f"the pattern {deeper!r} opens those in its subfolders" if deeper else expected
        return f"it holds {_listed(path)}; {remedy}."
    if matches := sorted(islice(matches_of(str(path)), MOST_FOLDERS)):
        others = ", ".join(repr(match.name) for match in matches[:5])
        return f"it matches {others}{', ...' if len(matches) > 5 else ''}; {expected}."
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(there).parts[0]
    start = "" if path.is_absolute() else f" (from the folder {str(Path.cwd())!r})"
    if glob.has_magic(missing):
        found = f"it holds {_listed(there)}"
        return f"no name in {str(there)!r} matches {missing!r}{start}; {found}."
    names = [one.name for one in there.iterdir()]
    near = difflib.get_close_matches(missing, names, n=1)
    remedy = f"a similar name there is {near[0]!r}" if near else f"it holds {_listed(there)}"
    return f"there is no {missing!r} in {str(there)!r}{start}; {remedy}."


def _listed(folder: Path) -> str:
    """The first names in a folder, and their number."""
    names = sorted(one.name for one in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more or "nothing"


def _pattern_below(folder: Path, suffixes: Collection[str]) -> str | None:
    """A pattern that matches the first weights found below a folder."""
    for root, _, files in islice(os.walk(folder), MOST_FOLDERS):
        found = [name for name in sorted(files) if is_weights(Path(root, name), suffixes)]
        if found:
            levels = Path(root).relative_to(folder).parts
            return str(folder.joinpath(*("*" for _ in levels), f"*{Path(found[0]).suffix}"))
    return None
