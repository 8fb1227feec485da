"""Private folders for writing a file or folder before it is moved to its place."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
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
LOCK = f"{MARK}lock"  # only folders with a file of this name are emptied
OPENED = Path("/proc/self/fd")  # where the system has paths of what the process has opened
MOST_FOLDERS = 1_000  # simultaneous saves to one name
WAIT, ATTEMPTS = 5.0, 1000  # seconds in which to get a lock, and how often to try


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Yield a path in a new folder next to ``target`` that only this user can enter.

    On Linux, the path stays in this folder even if others rename it meanwhile. Leftovers of killed
    processes for the same target are removed.
    """
    # including the name of the target could make this one too long
    name = f"{MARK}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-{{}}.tmp"
    n = 0
    with ExitStack() as stack:
        while (place := _make(target.parent / name.format(n), stack)) is None:
            n += 1
            if n == MOST_FOLDERS:
                raise FileExistsError(
                    f"{target.name!r} can't be written: {n:,} temporary folders beside it were in "
                    f"use, or exchanged by others. Choose a folder that only you can write to."
                )
        while (other := target.parent / name.format(n := n + 1)).is_dir():
            _sweep(other)
        yield place / "part"


def _make(folder: Path, stack: ExitStack) -> Path | None:
    """Make a folder that the stack removes, with a lock that is held while the process lives.

    Returns a path of the folder, or None if another save or somebody else has it.
    """
    _sweep(folder)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return None
    taken = FileNotFoundError, FileExistsError, NotADirectoryError  # by a sweep or somebody else
    with suppress(*taken), ExitStack() as made:
        made.callback(_remove_empty, folder)  # NFS keeps removed files in it until they are closed
        place = made.enter_context(_opened(folder))
        if any(place.iterdir()):
            return None
        lock = made.enter_context((place / LOCK).open("xb"))
        if not _is_private(place, lock):  # others could hold the lock
            (place / LOCK).unlink()
            return None
        _take(lock)
        if not _is_still(lock, place / LOCK):
            return None
        made.callback(_remove, place, lock)
        stack.enter_context(made.pop_all())
        return place
    return None


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    """Yield a path that leads to this folder even after it was renamed, if the system has one."""
    if folder.is_symlink():
        raise NotADirectoryError(str(folder))
    if not OPENED.is_dir():
        yield folder
        return
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        place = OPENED / str(file)
        yield place if place.is_dir() else folder
    finally:
        os.close(file)


def _is_private(place: Path, lock: IO[bytes]) -> bool:
    """Whether only the user who holds the lock can write to a folder, which has nothing else.

    Somebody else could have put another empty folder in the place of the one that was made.
    """
    status = place.stat()
    if status.st_uid != os.fstat(lock.fileno()).st_uid:
        return False
    with suppress(OSError):  # a file system without modes
        if status.st_mode & 0o077:
            place.chmod(stat.S_IMODE(status.st_mode) & ~0o077)
    return [path.name for path in place.iterdir()] == [LOCK]


def _sweep(folder: Path) -> None:
    """Remove a folder whose process has ended, so that its lock is released."""
    _remove_empty(folder)  # the process was killed before it made the lock
    with suppress(OSError), _opened(folder) as place:
        if fcntl is not None and _is_own(place):
            # r+b does not create a file; locks on NFS need a file opened for writing
            with (place / LOCK).open("r+b") as lock:
                if _take(lock, wait=False):
                    _remove(place, lock)
    _remove_empty(folder)


def _is_own(place: Path) -> bool:
    """Whether only this user can have put files into a folder."""
    status = place.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty; a save that just made it makes another one."""
    with suppress(OSError):
        folder.rmdir()


def _remove(place: Path, lock: IO[bytes]) -> None:
    """Remove only the files that saving creates in the folder of its lock.

    Another user could have renamed another folder to its name.
    """
    with suppress(OSError):
        if not _is_still(lock, place / LOCK):
            return
        part = place / "part"
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        # safetensors first writes to a file with such a name
        for path in (part, *place.glob(".tmp*"), place / LOCK):
            path.unlink(missing_ok=True)


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
