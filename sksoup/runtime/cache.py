"""Results of pure functions, kept under explicit keys, so that a search that was killed goes on."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import joblib
import torch

from ..exceptions import SoupWarning
from .distributed import broadcast, rank
from .fingerprint import fingerprint

ALGORITHM = 4  # counted up whenever the same inputs give other results than before

T = TypeVar("T")


class Cache:
    """Results that `pack` can write, in a `joblib.Memory`, under keys of all they depend on."""

    def __init__(self, memory: joblib.Memory) -> None:
        self._entry = memory.cache(entry, ignore=["compute"])
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
        payload = pack(value)
        with warnings.catch_warnings(record=True) as caught:  # how joblib reports a full disk
            warnings.simplefilter("always")
            try:
                self._entry(fingerprint(self._context, *key), lambda: payload)
            except OSError as error:
                warnings.warn(str(error), stacklevel=1)
        for warning in caught[:1]:
            self._warn(
                f"memory= could not keep a result ({warning.message}): the fit goes on, but if it "
                f"stops, this part is computed again. Make room in the folder, or make it writable."
            )

    def _find(self, key: tuple[Any, ...]) -> Any:
        digest = fingerprint(self._context, *key)
        if not self._entry.check_call_in_cache(digest, absent):
            return None
        try:
            shelved = self._entry.call_and_shelve(digest, absent)
        except LookupError:  # another process has just removed it
            return None
        try:
            return unpack(shelved.get())
        except Exception as error:  # unpickling raises anything on damaged files
            self._warn(
                f"An entry of memory= is damaged ({type(error).__name__}: {error}): it is computed "
                f"again."
            )
            shelved.clear()
            return None

    def _warn(self, message: str) -> None:
        """Warn, once in a fit."""
        if not self._warned:
            self._warned.append(message)
            warnings.warn(message, SoupWarning, stacklevel=4)


def entry(key: str, compute: Callable[[], bytes]) -> bytes:
    """One entry of the cache."""
    return compute()


def absent() -> bytes:
    """Compute nothing: the entry was there a moment ago."""
    raise LookupError("the entry is gone")


def open_cache(memory: Any) -> Cache | None:
    """The cache in a folder or a `joblib.Memory` that can be written to; None for None."""
    if memory is None or (isinstance(memory, joblib.Memory) and memory.location is None):
        return None
    if isinstance(memory, joblib.Memory):
        return Cache(memory)
    if not isinstance(memory, (str, os.PathLike)):
        raise TypeError(
            f"memory must be a folder, a joblib.Memory or None, got a {type(memory).__name__}."
        )
    try:
        return Cache(joblib.Memory(os.fspath(memory), verbose=0))
    except OSError as error:
        raise ValueError(
            f"memory={os.fspath(memory)!r} can't be used: {error.strerror}. Give a folder that can "
            f"be written to."
        ) from error


def pack(value: Any) -> bytes:
    """Tensors, numbers, strings, lists and dicts of them as bytes, with a checksum."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def unpack(payload: bytes) -> Any:
    """Read what `pack` wrote, on the CPU; runs no code that is in it."""
    digest, body = payload[:32], payload[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum is wrong")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
