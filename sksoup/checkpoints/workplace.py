"""Where a file or folder is written before it takes its place: a private folder beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is swept
    fcntl: Any = None  # type: ignore[no-redef]

MARK = ".sksoup-"  # how the names of these folders begin


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Give a path in a new folder beside ``target`` that only this user can enter.

    What processes that were killed had left of the same target is removed.
    """
    # the target's own name could make this one longer than names may be
    name = f"{MARK}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-{{}}.tmp"
    n = 0
    while (lock := _make(folder := target.parent / name.format(n))) is None:
        n += 1
    while (other := target.parent / name.format(n := n + 1)).is_dir():
        _sweep(other)
    with lock:
        try:
            yield folder / "part"
        finally:
            _remove(folder)


def _make(folder: Path) -> IO[bytes] | None:
    """Make a folder and the lock in it, held while its process lives; None where one is in use.

    A link that was planted by the name is there, too: it is not followed.
    """
    _sweep(folder)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return None
    path = folder / "lock"
    with suppress(FileNotFoundError):  # swept before it was locked
        lock = path.open("xb")
        _take(lock)
        if _is_still(lock, path):
            return lock
        lock.close()
    return None


def _sweep(folder: Path) -> None:
    """Remove a folder whose process is gone: the system has let go of its lock."""
    path = folder / "lock"
    # r+b makes no file; locks on NFS need a file that is open for writing
    with suppress(OSError), path.open("r+b") as lock:
        if not folder.is_symlink() and _take(lock, wait=False) and _is_still(lock, path):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove what a save puts into its folder, and nothing else.

    Who may rename folders here could have given its name to another one.
    """
    part = folder / "part"
    with suppress(OSError):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        # safetensors writes to a file of such a name first
        for path in (part, *folder.glob(".tmp*"), folder / "lock"):
            path.unlink(missing_ok=True)
        folder.rmdir()


def _take(lock: IO[bytes], wait: bool = True) -> bool:
    """Whether the lock was taken; False where another process has it, or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # a file system without locks: nothing there is ever swept
        return False
    return True


def _is_still(lock: IO[bytes], path: Path) -> bool:
    """Whether what was locked is still there, and no other file in its place."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to disk, where the system can."""
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
