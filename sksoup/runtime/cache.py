"""Results of pure functions, kept under explicit keys, so that a search that was killed goes on."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import joblib

from ..exceptions import SoupWarning
from .distributed import broadcast, rank
from .entries import SUFFIX, pack, read_entry, unpack, write_entry
from .fingerprint import fingerprint

ALGORITHM = 5  # counted up whenever the same inputs give other results than before
FOLDER = "sksoup"  # in the folder or the joblib.Memory that a user gives

T = TypeVar("T")


class Cache:
    """Results in a folder, a file each, under keys of all that they depend on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._context = str(ALGORITHM)
        self._warned: list[str] = []  # shared with what `within` gives

    def within(self, *context: Any) -> Cache:
        """The same cache, for results that depend on these values, too."""
        other = copy.copy(self)
        other._context = fingerprint(self._context, *context)
        return other

    def __call__(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """What is kept under this key, or computed, and kept."""
        found: T | None = self.find(*key)
        if found is None:
            found = compute()
            self.keep(found, *key)
        return found

    def find(self, *key: Any) -> Any:
        """What is kept under this key, or None; rank 0 looks for all ranks."""
        return broadcast(self._find(key) if rank() == 0 else None)

    def keep(self, value: Any, *key: Any, everywhere: bool = False) -> None:
        """Keep a value; rank 0 does, or each rank where each has other values."""
        if rank() and not everywhere:
            return
        digest = fingerprint(self._context, *key)
        try:
            write_entry(self._path(digest), pack(value, digest))
        except OSError as error:
            self._warn(
                f"memory= could not keep a result ({error}): the fit goes on, but if it stops, "
                f"this part is computed again. Make room in the folder, or make it writable."
            )

    def _find(self, key: tuple[Any, ...]) -> Any:
        digest = fingerprint(self._context, *key)
        try:
            return unpack(read_entry(self._path(digest)), digest)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(f"An entry of memory= is damaged ({error}): it is computed again.")
            return None

    def _path(self, digest: str) -> Path:
        return self._folder / (digest + SUFFIX)

    def _warn(self, message: str) -> None:
        """Warn, once in a fit."""
        if not self._warned:
            self._warned.append(message)
            warnings.warn(message, SoupWarning, stacklevel=4)


def open_cache(memory: Any) -> Cache | None:
    """The cache in a folder, or where a `joblib.Memory` has its own; None for None."""
    if isinstance(memory, joblib.Memory):
        if memory.backend != "local":
            raise TypeError(
                f"memory must be in a folder, got a joblib.Memory with backend={memory.backend!r}."
            )
        memory = memory.location
    if memory is None:
        return None
    if not isinstance(memory, (str, os.PathLike)):
        raise TypeError(
            f"memory must be a folder, a joblib.Memory or None, got a {type(memory).__name__}."
        )
    try:
        return Cache(Path(memory) / FOLDER)
    except (OSError, ValueError) as error:  # the latter for a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"memory={os.fspath(memory)!r} can't be used: {reason}. Give a folder that can be "
            f"written to."
        ) from error
