"""Private folders for writing a file or folder before it is moved to its place."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on Windows, where leftovers are not removed
    fcntl: Any = None  # type: ignore[no-redef]

MARK = ".sksoup-"  # prefix of the names of these folders
WAIT, ATTEMPTS = 5.0, 1000  # seconds in which to get a lock, and how often to try


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Yield a path in a new folder next to ``target`` that only this user can enter.

    Leftovers of killed processes for the same target are removed.
    """
    # including the name of the target could make this one too long
    name = f"{MARK}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-{{}}.tmp"
    n = 0
    while (lock := _make(folder := target.parent / name.format(n))) is None:
        n += 1
    while (other := target.parent / name.format(n := n + 1)).is_dir():
        _sweep(other)
    try:
        with lock:
            try:
                yield folder / "part"
            finally:
                if _is_still(lock, folder / "lock"):  # not exchanged by somebody else
                    _remove(folder)
    finally:
        _remove_empty(folder)  # NFS keeps a removed file in its folder until it is closed


def _make(folder: Path) -> IO[bytes] | None:
    """Make a folder with a lock that is held while the process lives; None if it is in use.

    An existing link with that name is not followed.
    """
    _sweep(folder)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return None
    path = folder / "lock"
    with suppress(FileNotFoundError, FileExistsError):  # another save swept or took the folder
        lock = path.open("xb")
        _take(lock)
        if _is_still(lock, path):
            return lock
        lock.close()
    return None


def _sweep(folder: Path) -> None:
    """Remove a folder whose process has ended, so that its lock is released."""
    _remove_empty(folder)  # the process was killed before it made the lock
    path = folder / "lock"
    # r+b does not create a file; locks on NFS need a file opened for writing
    with suppress(OSError), path.open("r+b") as lock:
        if not folder.is_symlink() and _take(lock, wait=False) and _is_still(lock, path):
            _remove(folder)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty; a save that just made it makes another one."""
    with suppress(OSError):
        folder.rmdir()


def _remove(folder: Path) -> None:
    """Remove only the files that saving creates in its folder.

    Another user could have renamed another folder to this name.
    """
    part = folder / "part"
    with suppress(OSError):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        # safetensors first writes to a file with such a name
        for path in (part, *folder.glob(".tmp*"), folder / "lock"):
            path.unlink(missing_ok=True)
        folder.rmdir()


def _take(lock: IO[bytes], wait: bool = True) -> bool:
    """Whether the lock was acquired; False if another process has it or locks are unsupported."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # a file system without locks: leftovers are not removed
        return False
    return True


def _is_still(lock: IO[bytes], path: Path) -> bool:
    """Whether the locked file still exists and was not replaced."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Exclude other threads and processes for moments, where folders can be locked.

    A lock that is held for longer, by another program, is not waited for.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that can't be read, or a file system without locks
            file = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, file)
            for _ in range(ATTEMPTS if fcntl is not None else 0):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(WAIT / ATTEMPTS)
        yield


def sync_below(folder: Path) -> None:
    """Flush all files and folders in a folder to disk, also those that were copied to it."""
    for root, _, names in os.walk(folder, topdown=False):
        for path in [*(os.path.join(root, name) for name in names), root]:
            sync_folder(Path(path))


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder (or a file) to disk, if the system supports it."""
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
