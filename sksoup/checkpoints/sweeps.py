"""Find training runs in folders, and select checkpoints of each run."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from ..exceptions import CheckpointError, SoupWarning
from .folders import (
    FOLDER_WEIGHTS,
    STEP,
    TRAINER_STATE,
    find_weights,
    list_files,
    place_of_checkpoint,
)
from .modules import MODULES, module_folders
from .read import place_of, real_path, suffix_of
from .records import Record, read_lightning, read_trainer

Which: TypeAlias = Literal["best", "last", "all"]

DEPTH = 2  # levels of folders between a sweep and its runs
# Lightning's folders, which do not count as levels
LIGHTNING = re.compile(r"lightning_logs|version_\d+|checkpoints")


def _word(*words: str) -> re.Pattern[str]:
    """One of these words in a name: model_best, bestModel, modelBest, bestmodel."""
    word, capital = "|".join(words), "|".join(map(str.capitalize, words))
    return re.compile(
        rf"(?i:(?<![a-z])(model)?({word})(model)?(?![a-z]))"
        rf"|(?<![A-Za-z])({word}|{capital})(?=[A-Z])|(?<=[a-z])({capital})(?![a-z])"
    )


NAMED_BEST, NAMED_LAST = _word("best"), _word("last", "latest", "final")
# names of files of a single training run
TIMED = _word("epoch", "step", "iter", "iteration", "last", "latest", "best", "final")
TIME = re.compile(r"(?i)(?<![a-z])(?:epoch|step|iter|iteration)[^a-z0-9]*([0-9]+)")


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which digits are compared by value: ft2 before ft10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


@dataclass(frozen=True)
class Run:
    """A folder with the checkpoints of one training run, or a single checkpoint."""

    folder: Path
    checkpoints: Sequence[Path]
    is_alone: bool = False

    def joined(self, other: Run) -> Run:
        """The same run with the checkpoints that were found in it at another path."""
        if self.is_alone and other.is_alone:
            return self
        found = {place_of_checkpoint(p): p for p in (*other.checkpoints, *self.checkpoints)}
        return Run(self.folder, [*found.values()])

    @cached_property
    def record(self) -> Record:
        """The training loop's record of these checkpoints."""
        if steps := sorted(self._steps, key=natural_key, reverse=True):
            # a run that was killed may have written the weights of the last step only, and one that
            # was resumed may have an older state in its folder
            states = [path / TRAINER_STATE for path in steps]
            newest = next((path for path in states if path.is_file()), states[0])
            found = [
                read_trainer(path, (self.final or self.folder).name)
                for path in (newest, self.folder / TRAINER_STATE)
            ]
            return max(found, key=lambda record: record.last)
        if self.is_alone and self.folder.is_dir():
            return read_trainer(self.folder / TRAINER_STATE, self.folder.name)
        return read_lightning(self.checkpoints)

    @property
    def _steps(self) -> list[Path]:
        """The folders written by Trainer."""
        return [path for path in self.checkpoints if STEP.fullmatch(path.name)]

    @cached_property
    def ordered(self) -> list[Path]:
        """The checkpoints in order of time; copies, such as last.ckpt, are left out."""
        versions = {} if self._steps else self.record.versions

        def time(path: Path) -> tuple[int, int, int, list[tuple[int, int, str]]]:
            step, _ = versions.get(path.name, (-1, 0))
            rank = 2  # of copies, the first is kept
            if NAMED_LAST.search(path.stem):
                rank = 3
            if NAMED_BEST.search(path.stem):
                rank = 1
            if step >= 0 and path.name == self.record.best:
                rank = 0
            named = TIME.search(path.stem) or STEP.fullmatch(path.name)
            # Lightning's best.ckpt is before best-v1.ckpt
            key = natural_key(Path(re.sub(r"(-v\d+)(\.[^./]*)$", r"\2\1", str(path))))
            return step, rank, int(named[1]) if named else -1, key

        found: dict[object, Path] = {}
        for path in sorted(self.checkpoints, key=time):
            found.setdefault(versions.get(path.name, place_of(path)), path)
        return list(found.values())

    @cached_property
    def best(self) -> Path | None:
        """The best checkpoint according to the record or a file name; None if unknown."""
        for path in self.ordered:
            if path.name == self.record.best:
                return path
        named = [path for path in self.ordered if NAMED_BEST.search(path.stem)]
        plain = [path for path in named if not re.search(r"\d", path.stem)]
        one = plain[0].stem if len(plain) == 1 else ""
        # Lightning numbers files of one name as they are written: best, best-v1, best-v2
        if one and not any(re.fullmatch(rf"{re.escape(one)}-v\d+", path.stem) for path in named):
            return plain[0]
        if len(named) > 1:  # often one more each time that the score improves
            names = ", ".join(repr(path.name) for path in named[:3])
            warnings.warn(
                f"{str(self.folder)!r} holds {len(named)} files named best ({names}"
                f"{', ...' if len(named) > 3 else ''}), and no record says which is; the last of "
                f"them is used, {named[-1].name!r}. If another one is, list the files to mix.",
                SoupWarning,
                stacklevel=2,
            )
        return named[-1] if named else None

    def take(self, which: Which) -> list[Path]:
        """The requested checkpoints."""
        if self.is_alone:
            return list(self.checkpoints)
        if which == "all":
            return self.ordered
        self._refuse_several(which)
        if which == "best" and self.best is not None:
            return [self.best]
        # the final model, if Trainer has not loaded the best one at the end
        is_last = self.record.best not in {path.name for path in self.checkpoints}
        return [self.final] if self.final and is_last else self.ordered[-1:]

    def _refuse_several(self, which: Which) -> None:
        """Refuse files of the same step that differ and do not record one best: several runs."""
        first: dict[int, Path] = {}
        bests = self.record.bests
        for path in self.ordered:
            step, _ = self.record.versions.get(path.name, (-1, 0))
            other = first.setdefault(step, path)
            is_one_run = bests.get(path.name) and bests[path.name] == bests.get(other.name)
            if step >= 0 and other is not path and not is_one_run:
                raise CheckpointError(
                    f"{str(self.folder)!r} seems to hold several runs: {other.name!r} and "
                    f"{path.name!r} are both of step {step} and differ, so the {which} of a run is "
                    f"not known. Move each run to a folder of its own, pass which='all', or list "
                    f"the files to mix."
                )

    @cached_property
    def final(self) -> Path | None:
        """The final model that Trainer saved in the folder, in addition to the checkpoints."""
        if self.is_alone:
            return None
        if find_weights(self.folder):
            return self.folder
        files = [self.folder / name for name in FOLDER_WEIGHTS if self._steps]  # of any network
        return next((path for path in files if path.is_file()), None)


class Seen:
    """The folders that were searched, maybe through links, and how many levels below each."""

    def __init__(self) -> None:
        self._levels: dict[str, list[tuple[int, int, int]]] = {}
        self.n_searches = 0
        self.n_again = 0  # how often one came to a folder of an earlier search
        self.holding: dict[str, bool] = {}  # whether folders beside checkpoints hold runs

    @cached_property
    def below(self) -> Seen:
        """The folders below checkpoints that were searched for runs, to warn of them."""
        return Seen()

    def is_new(self, folder: Path, depth: int = DEPTH, lightning: int = DEPTH + 1) -> bool:
        """Whether a folder was not yet searched so far down; from now on, it was."""
        before = self._levels.setdefault(real_path(folder), [])
        for one, other, search in before:
            if depth <= one and lightning <= other:
                self.n_again += search < self.n_searches
                return False
        before.append((depth, lightning, self.n_searches))
        return True


def _refuse_modules(folder: Path, inner: Sequence[Path]) -> None:
    """Refuse a model of sentence-transformers whose weights are in several of its modules."""
    if not (folder / MODULES).is_file():
        return
    known = module_folders(folder)
    parts = [path for path in inner if path in known and find_weights(path)]
    if len(parts) > 1:
        pattern = os.path.join(folder.parent, "*", parts[0].name)
        raise CheckpointError(
            f"{str(folder)!r} is a model of sentence-transformers with weights in {len(parts)} "
            f"modules, such as {parts[0].name!r} and {parts[1].name!r}, which are not checkpoints "
            f"of one network. Mix each module by itself: from_path({pattern!r})."
        )


def find_runs(
    folder: Path,
    suffixes: Collection[str],
    depth: int = DEPTH,
    lightning: int = DEPTH + 1,
    seen: Seen | None = None,
    looks_below: bool = True,
) -> Iterator[Run]:
    """The runs and the single checkpoints in a folder, in natural order.

    Folders that were ``seen``, maybe through a link, are not visited again. ``looks_below``: warn
    of what is below a folder with checkpoints.
    """
    if seen is None:
        seen = Seen()
        seen.is_new(folder, depth, lightning)
    inner = [path for path in folder.iterdir() if path.is_dir() and path.name[:1] != "."]
    inner = sorted(_readable(inner), key=natural_key)
    steps = [path for path in inner if STEP.fullmatch(path.name) and find_weights(path)]
    if find_weights(folder):
        taken = {*steps}
        more = [path for path in inner if path not in taken and find_weights(path)]
        known = module_folders(folder) if more else ()
        if more := [path for path in more if path not in known]:
            raise CheckpointError(
                f"{str(folder)!r} is a checkpoint and holds {len(more)} more, such as "
                f"{more[0].name!r}. Choose which to open: CheckpointCollection([{str(folder)!r}]) "
                f"opens only the folder itself, and from_path({os.path.join(folder, '*', '')!r}) "
                f"opens those in it."
            )
        yield Run(folder, steps or [folder], is_alone=not steps)
        return
    _refuse_modules(folder, inner)
    files = sorted(list_files(folder, suffixes), key=natural_key)
    if steps:  # without Trainer's final model
        files = [path for path in files if path.name not in FOLDER_WEIGHTS]
    if files or steps:
        found = sorted([*files, *filter(find_weights, inner)], key=natural_key)
        if looks_below:
            taken = {*found}
            others = [path for path in inner if path not in taken]
            _warn_of_runs_below(folder, found, others, suffixes, seen)
        if steps or any(suffix_of(path) == ".ckpt" or TIMED.search(path.stem) for path in files):
            yield Run(folder, found)
        else:
            yield from alone(found)
        return
    for path in inner:
        is_lightning = LIGHTNING.fullmatch(path.name) is not None
        left = depth - (not is_lightning), lightning - is_lightning
        if min(left) >= 0 and seen.is_new(path, *left):
            yield from find_runs(path, suffixes, *left, seen, looks_below)


def _readable(folders: Sequence[Path]) -> list[Path]:
    """Those that may be read, with a warning of others, such as lost+found of a file system."""
    is_open = {path: os.access(path, os.R_OK | os.X_OK) for path in folders}
    closed = [path for path in folders if not is_open[path]]
    if closed:
        warnings.warn(
            f"{_counted(closed, 'folder')} can't be read, such as {str(closed[0])!r}, and "
            f"{'is' if len(closed) == 1 else 'are'} left out. If it holds checkpoints, change its "
            f"permissions.",
            SoupWarning,
            stacklevel=2,
        )
    return [path for path in folders if is_open[path]]


def _warn_of_runs_below(
    folder: Path,
    found: Sequence[Path],
    inner: Sequence[Path],
    suffixes: Collection[str],
    seen: Seen,
) -> None:
    """Warn if a folder with checkpoints, maybe a soup, has runs in the folders below it."""
    seen.below.is_new(folder)
    places: dict[str, Path] = {}
    for path in inner:
        if (place := real_path(path)) not in seen.holding:
            seen.holding[place] = _holds_runs(path, suffixes, seen.below)
        places.setdefault(place, path)
    below = [path for place, path in places.items() if seen.holding[place]]
    if below:
        names = ", ".join(repr(path.name) for path in (found[0], below[0]))
        pattern = os.path.join(folder, "*", "")
        warnings.warn(
            f"{str(folder)!r} holds {_counted(found, 'checkpoint')} and "
            f"{_counted(below, 'folder')} with more "
            f"({names}); only the former are used. To use the latter, give {pattern!r}; keep "
            f"soups and the pretrained start elsewhere.",
            SoupWarning,
            stacklevel=2,
        )


def _counted(paths: Sequence[Path], what: str) -> str:
    return f"{len(paths)} {what}{'s' * (len(paths) > 1)}"


def _holds_runs(folder: Path, suffixes: Collection[str], seen: Seen) -> bool:
    if not seen.is_new(folder, DEPTH - 1):
        return False
    try:
        runs = find_runs(folder, suffixes, DEPTH - 1, seen=seen, looks_below=False)
        return next(runs, None) is not None
    except (CheckpointError, OSError):  # not used
        return False


def alone(paths: Iterable[Path]) -> list[Run]:
    """Checkpoints that do not belong to a run with others."""
    return [Run(path, [path], is_alone=True) for path in paths]


def by_folder(runs: Sequence[Run]) -> list[Run]:
    """The same, if files in one folder or steps of Trainer belong to one run."""
    found: dict[Path, list[Path]] = {}
    for run in runs:
        is_part = run.is_alone and (run.folder.is_file() or STEP.fullmatch(run.folder.name))
        found.setdefault(run.folder.parent if is_part else run.folder, []).extend(run.checkpoints)
    return [Run(folder, paths, paths == [folder]) for folder, paths in found.items()]
