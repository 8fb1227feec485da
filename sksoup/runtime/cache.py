"""Results of pure functions, kept under explicit keys, so that a search that was killed goes on."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import joblib
import numpy as np
import torch
from torch import nn

from ..checkpoints.read import pack, unpack
from ..exceptions import SoupWarning
from .distributed import from_first, rank

ALGORITHM = 3  # counted up whenever the same inputs give other results than before

T = TypeVar("T")


class Memo:
    """What was computed already, in a `joblib.Memory`; the key tells all that a result depends on.

    Values are numbers, strings, tensors, lists and dicts of them. Without a memory nothing is kept
    or found, and no key is computed.
    """

    def __init__(self, memory: joblib.Memory | None) -> None:
        self._entry = None if memory is None else memory.cache(entry, ignore=["compute"])
        self._context = str(ALGORITHM)
        self._told: list[str] = []  # shared with what `within` gives

    def __bool__(self) -> bool:
        return self._entry is not None

    def within(self, *context: Any) -> Memo:
        """The same memory, for results that depend on these values, too."""
        other = Memo(None)
        other._entry, other._told, other._context = self._entry, self._told, self._context
        if self:
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
        if not self:
            return None
        return from_first(self._find(key) if rank() == 0 else None)

    def keep(self, value: Any, *key: Any, everywhere: bool = False) -> None:
        """Keep a value; rank 0 does, or each rank where each has other values."""
        if self._entry is None or (rank() and not everywhere):
            return
        payload = pack(value)
        with warnings.catch_warnings(record=True) as caught:  # how joblib tells of a full disk
            warnings.simplefilter("always")
            try:
                self._entry(fingerprint(self._context, *key), lambda: payload)
            except OSError as error:
                warnings.warn(str(error), stacklevel=1)
        for warning in caught[:1]:
            self._tell(
                f"memory= could not keep a result ({warning.message}): the fit goes on, but if it "
                f"stops, this part is computed again. Make room in the folder, or make it writable."
            )

    def _find(self, key: tuple[Any, ...]) -> Any:
        digest = fingerprint(self._context, *key)
        if self._entry is None or not self._entry.check_call_in_cache(digest, absent):
            return None
        try:
            shelved = self._entry.call_and_shelve(digest, absent)
        except LookupError:  # another process has just removed it
            return None
        try:
            return unpack(shelved.get())
        except Exception as error:  # unpickling raises anything on damaged files
            self._tell(
                f"An entry of memory= is damaged ({type(error).__name__}: {error}): it is computed "
                f"again."
            )
            shelved.clear()
            return None

    def _tell(self, message: str) -> None:
        """Warn, once in a fit."""
        if not self._told:
            self._told.append(message)
            warnings.warn(message, SoupWarning, stacklevel=4)


def entry(key: str, compute: Callable[[], bytes]) -> bytes:
    """One entry of the cache."""
    return compute()


def absent() -> bytes:
    """Compute nothing: the entry was there a moment ago."""
    raise LookupError("the entry is gone")


def open_memory(memory: Any) -> joblib.Memory | None:
    """A folder, a `joblib.Memory` or None as a memory that can be written to."""
    if isinstance(memory, joblib.Memory):
        return memory if memory.location is not None else None
    if memory is None:
        return None
    if not isinstance(memory, (str, os.PathLike)):
        raise TypeError(
            f"memory must be a folder, a joblib.Memory or None, got a {type(memory).__name__}."
        )
    try:
        return joblib.Memory(os.fspath(memory), verbose=0)
    except OSError as error:
        raise ValueError(
            f"memory={os.fspath(memory)!r} can't be used: {error.strerror}. Give a folder that can "
            f"be written to."
        ) from error


# --------------------------------------------------------------------- fingerprints


def fingerprint(*values: Any) -> str:
    """SHA-256 of values: equal for equal values, in any process."""
    digest = hashlib.sha256()
    for part in encode(list(values)):
        digest.update(part)
    return digest.hexdigest()


def encode(value: Any) -> Iterator[Any]:
    """Bytes that tell a value from others; bytes-like pieces, so that arrays are not copied."""
    value = value.item() if isinstance(value, np.generic) else value
    yield f"{type(value).__qualname__}(".encode()
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        yield repr(value).encode()
    elif isinstance(value, (bytes, memoryview)):
        yield value
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    elif isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield flat.view(torch.uint8).numpy().data
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from encode(part)
    elif isinstance(value, (set, frozenset)):
        yield from encode(sorted(value, key=repr))
    elif isinstance(value, Mapping):
        for name in sorted(value, key=repr):
            yield from encode(name)
            yield from encode(value[name])
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, nn.Module):
        yield from encode_module(value)
        yield from encode(dict(value.state_dict()))
    else:
        yield from encode_function(value) if callable(value) else encode_other(value)
    yield b")"


def encode_module(module: nn.Module) -> Iterator[Any]:
    """A module by the types and settings of all its parts, without its weights.

    Buffers outside the state dict are settings.
    """
    saved = module.state_dict()
    for name, part in module.named_modules():
        yield from encode([name, type(part)])
        if type(part).__module__.partition(".")[0] != "torch":
            yield from encode_function(type(part).forward)
        yield from encode({k: b for k, b in part.named_buffers(name, False) if k not in saved})
        for key, value in sorted(vars(part).items()):
            if not key.startswith("_") and key != "training":
                yield from encode(key)
                try:
                    yield from encode(value)
                except TypeError:  # a part of the user's that does not pickle
                    yield from encode(type(value))


def encode_function(function: Any) -> Iterator[Any]:
    """A function by its code, defaults and what it encloses; other callables by their pickle."""
    if isinstance(function, functools.partial):
        yield from encode([function.func, function.args, function.keywords])
    elif isinstance(function, types.MethodType):
        yield from encode([function.__func__, function.__self__])
    elif isinstance(function, types.FunctionType):
        yield function.__qualname__.encode()
        yield from encode_code(function.__code__)
        yield from encode([function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            yield from encode(cell.cell_contents)
    else:
        called = type(function).__call__
        if isinstance(called, types.FunctionType):
            yield from encode_function(called)
        yield from encode_other(function)


def encode_code(code: types.CodeType) -> Iterator[Any]:
    """A function by its bytecode and what that refers to."""
    yield code.co_code
    yield from encode([code.co_names, code.co_varnames])
    for constant in code.co_consts:
        is_code = isinstance(constant, types.CodeType)
        yield from encode_code(constant) if is_code else encode(constant)


def encode_other(value: Any) -> Iterator[Any]:
    """A value by its pickle."""
    try:
        yield pickle.dumps(value)
    except Exception as error:  # pickling raises anything
        raise TypeError(
            f"memory= can't tell whether {value!r} has changed, since it can't be pickled "
            f"({error}). Give something that can, or memory=None."
        ) from error
    for part in getattr(value, "__dict__", {}).values():
        if isinstance(part, types.FunctionType):  # a pickle holds its name alone
            yield from encode_function(part)
