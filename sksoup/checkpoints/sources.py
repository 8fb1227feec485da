"""Convert files, folders, modules, nets and state dicts to checkpoints with names."""

from __future__ import annotations

import logging
import os
import warnings
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn

from ..exceptions import CheckpointError, SoupWarning
from ..tables import printable
from .folders import FOLDER_WEIGHTS, is_weights, place_of_checkpoint, weights_of
from .hub_config import refuse_quantized
from .in_memory import MemoryCheckpoint
from .not_found import nothing_at
from .patterns import matches_of
from .protocol import Checkpoint, Entry
from .read import SafetensorsFile, real_path, suffix_of
from .shards import INDEX, ShardedCheckpoint
from .sweeps import Run, Seen, Which, alone, by_folder, find_runs, natural_key
from .torch_files import TorchFile

logger = logging.getLogger("sksoup")

# the file formats: the first one that accepts a file opens it
KINDS = (ShardedCheckpoint, SafetensorsFile, TorchFile)
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind.suffixes)


def open_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Read the header of a checkpoint: a file, a shard index, or a folder with either."""
    file = weights_of(path) if path.is_dir() else path
    refuse_quantized(path)
    for kind in KINDS:
        if kind.accepts(file):
            return kind(file, key, path)
    why = f"it has the suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}"
    if not path.exists():
        why = "there is no such file or folder"
    raise CheckpointError(f"{str(path)!r} is not a checkpoint that sksoup can read: {why}.")


def open_source(item: Any, index: int, key: str | None) -> Entry:
    """A non-empty checkpoint from a path, a module, a net, a state dict, or a checkpoint."""
    entry = _entry(item, index, key)
    if not entry.checkpoint.header:
        raise CheckpointError(
            f"{entry!r} holds no tensors, expected a state dict (tensor name -> tensor)."
        )
    return entry


def _entry(item: Any, index: int, key: str | None) -> Entry:
    if isinstance(item, Checkpoint):
        return Entry(item)
    if isinstance(item, Entry):  # of another collection
        found = item.checkpoint
        if key in (None, found.key) or found.path is None:
            return item
        return Entry(open_checkpoint(found.path, key))
    if isinstance(item, (str, os.PathLike)):
        return Entry(open_checkpoint(Path(os.path.expanduser(item)).absolute(), key))
    if isinstance(trained := getattr(item, "module_", None), nn.Module):  # a fitted skorch net
        item = trained
    if isinstance(item, nn.Module):
        item = item.state_dict()
    if isinstance(item, Mapping):
        return Entry(MemoryCheckpoint(item, f"checkpoint {index} (in memory)"))
    raise TypeError(
        f"checkpoints[{index}] is a {type(item).__name__}, expected a path, an nn.Module, a fitted "
        f"skorch net or a state dict."
    )


def paths_of(checkpoints: Any, names: Iterable[str]) -> list[Path]:
    """The files and folders of checkpoints in a collection, then those of adapters' bases."""
    known = list(names)
    paths = [checkpoints.path(name) for name in known]
    paths += [one.base.path for one in checkpoints.adapters(known).values()]
    return [path for path in paths if path is not None]


@dataclass(frozen=True)
class Found:
    """The checkpoints found at paths, and which of them were taken."""

    paths: list[Path]
    names: list[str] | None  # if the file names would not distinguish the runs
    runs: list[Run]  # the run of each path
    taken: str  # in words; empty if there was no choice


def find_checkpoints(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], which: Which | None = None
) -> Found:
    """The checkpoints in folders, sweeps, patterns and files, each once, in natural order."""
    if which not in (None, *get_args(Which)):
        raise ValueError(f"which={which!r} is unknown: expected 'best', 'last', 'all' or None.")
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise CheckpointError("No checkpoints: expected at least one path or pattern.")
    once: dict[object, Run] = {}  # links may lead to a run from several paths, as may patterns
    seen: defaultdict[bool, Seen] = defaultdict(Seen)  # by folders and by patterns
    for run in (run for path in given for run in _runs_at(path, which, seen)):
        place = place_of_checkpoint(run.folder)
        once[place] = once[place].joined(run) if place in once else run
    runs = [*once.values()]
    several = [run for run in runs if not run.is_alone]
    # a folder that was given itself, such as the start, is no run of a sweep
    single = {real_path(os.path.expanduser(path)) for path in given}
    n_folders = sum(
        run.folder.is_dir() and not (run.is_alone and real_path(run.folder) in single)
        for run in runs
    )
    if which in ("best", "last") and not several and len(runs) > 1:
        warnings.warn(
            f"which={which!r} changes nothing: each of the {len(runs)} checkpoints is taken for a "
            f"run of its own, as no folder has checkpoint-N folders, .ckpt files, or files named "
            f"after an epoch, a step, best or last. If some are of one run, list those to mix.",
            SoupWarning,
            stacklevel=2,
        )
    which = which or ("best" if n_folders > 1 else "all")
    chosen: dict[object, tuple[Path, str, Run]] = {}
    for run, name in zip(runs, unique_names([_folder_of(run) for run in runs]), strict=True):
        found = run.take(which)
        ends = unique_names(found) if len(found) > 1 else ("",)
        for path, end in zip(found, ends, strict=True):
            label = f"{name}/{end}" if end else name
            chosen.setdefault(place_of_checkpoint(path), (path, label, run))
    taken = [*chosen.values()]
    said = _in_words(several, which)
    if said:
        listed = ", ".join(str(path) for path, _, _ in taken)
        logger.info("Took %s: %s", said, printable(listed))
    return Found(
        [path for path, _, _ in taken],
        [label for _, label, _ in taken] if several and len(runs) > 1 else None,
        [run for _, _, run in taken],
        said,
    )


def _runs_at(
    path: str | os.PathLike[str], which: Which | None, searched: defaultdict[bool, Seen]
) -> list[Run]:
    """The runs at one path, or those that match one pattern, in folders that are new."""
    full = os.path.expanduser(path)
    root = Path(full)
    is_path = root.exists()
    if is_path and not root.is_dir():
        return alone([root])
    seen = searched[is_path]
    seen.n_searches += 1
    runs: list[Run] = []
    n_again = seen.n_again
    for match in [root] if is_path else sorted(matches_of(full), key=natural_key):
        if match.is_dir():
            runs += find_runs(match, SUFFIXES, seen=seen) if seen.is_new(match) else ()
        elif is_weights(match, SUFFIXES) or match.name.endswith(INDEX):
            runs += alone([match])
    if which in ("best", "last") and not is_path:
        runs = by_folder(runs)
    if not runs and seen.n_again == n_again:
        raise nothing_at(os.fspath(path), SUFFIXES)
    return runs


def _in_words(runs: Sequence[Run], which: Which) -> str:
    """Describe what was taken from the runs that have several checkpoints."""
    if not runs:
        return ""
    n = len(runs)
    of = f"each of {n} runs" if n > 1 else "one run"
    said = f"{'all' if which == 'all' else f'the {which}'} of {of}"
    if which == "best" and (untold := sum(run.best is None for run in runs)):
        said += f", the last of {untold} without a record of the best"
    if which == "all" and any(run.final for run in runs):
        said += ", without the final model beside them"
    return said


def _folder_of(run: Run) -> Path:
    """The folder whose name is used for a run."""
    is_lightning = not run.is_alone and run.folder.name == "checkpoints"
    return (run.folder.parent if is_lightning else run.folder).absolute()


def default_names(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Names of checkpoints from their paths; checkpoint0, ... for those in memory."""
    return unique_names([entry.checkpoint.path for entry in entries])


def unique_names(paths: Sequence[Path | None]) -> tuple[str, ...]:
    """File stems, with suffixes or folders if they repeat; checkpoint0, ... for None."""
    found = [None if path is None else _named(path) for path in paths]

    def names(depth: int, suffix: bool) -> tuple[str, ...]:
        return tuple(
            f"checkpoint{k}"
            if one is None
            else "/".join([*one[0], one[2] if suffix else one[1]][-depth:])
            for k, one in enumerate(found)
        )

    def are_unique(depth: int) -> bool:  # if so, also with more folders
        return len(set(names(depth, True))) == len(paths)

    most = max((len(one[0]) + 1 for one in found if one is not None), default=1)
    depth = 1 + bisect_left(range(1, most), True, key=are_unique)
    for suffix in (False, True):
        chosen = names(depth, suffix)
        count = Counter(chosen)
        if len(count) == len(paths):
            return chosen
    # the same file was passed more than once
    return tuple(f"{n}#{i}" if count[n] > 1 else n for i, n in enumerate(chosen))


def _named(path: Path) -> tuple[Sequence[str], str, str]:
    """Folders, stem and name; a file that all folders have is named by its folder."""
    if path.is_file() and path.name in FOLDER_WEIGHTS:
        path = path.parent
    stem = path.stem if suffix_of(path) == path.suffix.lower() else Path(path.stem).stem
    return path.parent.parts[1:], path.name if path.is_dir() else stem, path.name
