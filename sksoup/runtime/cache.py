"""Store results of pure functions under explicit keys, so that interrupted fits can resume."""

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

ALGORITHM = 7  # increased whenever results change for the same inputs
FOLDER = "sksoup"  # in the user's folder or joblib.Memory

T = TypeVar("T")


class Cache:
    """Results in a folder, one file each, under keys of everything that they depend on."""

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
        """The result stored under this key; computed and stored if there is none."""
        found: T | None = self.find(*key)
        if found is None:
            found = compute()
            self.keep(found, *key)
        return found

    def find(self, *key: Any) -> Any:
        """The result stored under this key, or None; rank 0 reads it for all ranks."""
        return broadcast(self._find(key) if rank() == 0 else None)

    def keep(self, value: Any, *key: Any, everywhere: bool = False) -> None:
        """Store a value, on rank 0, or on each rank if values differ."""
        if rank() and not everywhere:
            return
        digest = fingerprint(self._context, *key)
        try:
            write_entry(self._path(digest), pack(value, digest))
        except OSError as error:
            self._warn(
                f"memory= could not store a result ({error}). The fit continues, but if it is "
                f"interrupted, this part will be computed again. Free some disk space, or make the "
                f"folder writable."
            )

    def _find(self, key: tuple[Any, ...]) -> Any:
        digest = fingerprint(self._context, *key)
        try:
            return unpack(read_entry(self._path(digest)), digest)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(f"An entry of memory= is damaged ({error}) and is computed again.")
            return None

    def _path(self, digest: str) -> Path:
        return self._folder / (digest + SUFFIX)

    def _warn(self, message: str) -> None:
        """Warn once per fit."""
        if not self._warned:
            self._warned.append(message)
            warnings.warn(message, SoupWarning, stacklevel=4)


def open_cache(memory: Any) -> Cache | None:
    """The cache in a folder, or where a `joblib.Memory` has its own; None for None."""
    if isinstance(memory, joblib.Memory):
        if memory.backend != "local":
            raise TypeError(
                f"memory must use a local folder, got a joblib.Memory with "
                f"backend={memory.backend!r}."
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
            f"memory={os.fspath(memory)!r} can't be used: {reason}. Pass a folder that can be "
            f"written to."
        ) from error
