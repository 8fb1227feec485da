"""Digests of values: equal for equal values, in any process."""

from __future__ import annotations

import dis
import functools
import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from joblib.hashing import NumpyHasher
from torch import nn

Within: TypeAlias = tuple[types.FunctionType | nn.Module, ...]  # what is being encoded
OF_TORCH = frozenset(vars(nn.Module()))  # what every module has: hooks, parameters, its mode
# how transformers samples texts: nothing in the outputs, and it holds hashes of this process
NO_SETTING = OF_TORCH | {"generation_config"}
PLAIN = (bool, int, float, str, torch.dtype, torch.device)
READS = ("LOAD_GLOBAL", "LOAD_NAME")  # instructions that read a global variable
SPARSE = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip
DEEPEST = 10  # containers in each other


def tensor_bytes(value: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; not copied where it lies so on the CPU."""
    return flat_bytes(value.detach().resolve_conj().resolve_neg().cpu()).numpy().data


def flat_bytes(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order, a view if possible."""
    # the stride of a single value may be anything, also if it is contiguous
    return value.contiguous().as_strided((value.numel(),), (1,)).view(torch.uint8)


class Hasher(NumpyHasher):  # type: ignore[misc]
    """Joblib's digest of objects, but tensors by value and functions by their code.

    A pickle holds the address of a tensor, and of a function its name alone, if it has one.
    """

    def __init__(self, within: Within) -> None:
        super().__init__(hash_name="sha1")
        self.within = within

    def reducer_override(self, value: Any) -> Any:
        """Replace a tensor or a function by its digest, where it has one."""
        if type(value) not in (torch.Tensor, types.FunctionType):
            return NotImplemented
        try:
            return str, (digest_of(encode(value, self.within)),)
        except (TypeError, ValueError):
            return NotImplemented


def fingerprint(*values: Any) -> str:
    """SHA-256 of values: equal for equal values, in any process."""
    return digest_of(encode(list(values)))


def digest_of(parts: Iterable[Any]) -> str:
    """SHA-256 of bytes in pieces."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def encode(value: Any, within: Within = ()) -> Iterator[Any]:
    """Bytes that tell a value from others; bytes-like pieces, so that arrays are not copied."""
    value = value.item() if isinstance(value, np.generic) else value
    yield f"{type(value).__qualname__}(".encode()
    if value is None or isinstance(value, PLAIN):
        yield repr(value).encode()
    elif isinstance(value, (bytes, memoryview)):
        yield value
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    elif isinstance(value, torch.Tensor) and value.layout in SPARSE:
        found: Any = value.detach()  # whose method has no type
        entries = found.to_sparse_coo().coalesce()
        yield from encode([tuple(value.shape), entries.indices(), entries.values()], within)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield tensor_bytes(value)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from encode(part, within)
    elif isinstance(value, (set, frozenset)):
        yield from encode(sorted(value, key=repr), within)
    elif isinstance(value, Mapping):
        for name in sorted(value, key=repr):
            yield from encode(name, within)
            yield from encode(value[name], within)
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, nn.Module):
        whole = (w for w in within if isinstance(w, nn.Module))
        names = [name for w in whole for name, part in w.named_modules() if part is value]
        if names:  # a part of what is being encoded
            yield names[0].encode()
        else:
            yield from encode_module(value, within)
            yield from encode(dict(value.state_dict()), within)
    else:
        yield from (
            encode_function(value, within) if callable(value) else encode_other(value, within)
        )
    yield b")"


def encode_module(module: nn.Module, within: Within = ()) -> Iterator[Any]:
    """A module by the types and settings of all its parts, without its weights.

    Buffers outside the state dict are settings, and so are private attributes of the user's parts.
    """
    saved = module.state_dict()
    within = (*within, module)
    for name, part in module.named_modules():
        is_of_torch = type(part).__module__.partition(".")[0] == "torch"
        yield from encode([name, type(part)], within)
        if not is_of_torch:
            yield from encode_function(type(part).forward, within)
        yield from encode(
            {k: b for k, b in part.named_buffers(name, False) if k not in saved}, within
        )
        for key, value in sorted(vars(part).items()):
            if key not in NO_SETTING and not (is_of_torch and key.startswith("_")):
                yield from encode(key, within)
                try:
                    yield from list(encode(value, within))
                except (TypeError, ValueError):  # a part of the user's that does not pickle
                    yield from encode(type(value), within)


def encode_function(function: Any, within: Within = ()) -> Iterator[Any]:
    """A function by its code, defaults and what it encloses; other callables by their pickle."""
    if isinstance(function, functools.partial):
        yield from encode([function.func, function.args, function.keywords], within)
    elif isinstance(function, types.MethodType):
        yield from encode([function.__func__, function.__self__], within)
    elif any(function is one for one in within):  # a function that encloses itself
        yield b"itself"
    elif isinstance(function, types.FunctionType):
        within = (*within, function)
        yield function.__qualname__.encode()
        yield from encode_code(function.__code__, within)
        yield from encode(global_data(function), within)
        yield from encode([function.__defaults__, function.__kwdefaults__], within)
        for cell in function.__closure__ or ():
            yield from encode(cell.cell_contents, within)
    else:
        called = type(function).__call__
        if isinstance(called, types.FunctionType):
            yield from encode_function(called, within)
        yield from encode_other(function, within)


def global_data(function: types.FunctionType) -> dict[str, Any]:
    """Numbers, texts, arrays and tensors, and containers of them, that a function reads by name.

    Other global variables, such as functions and modules, are not part of what it is.
    """
    todo, names = [function.__code__], set()
    for code in todo:  # grows in the loop: by functions inside it
        todo += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        names |= {part.argval for part in dis.get_instructions(code) if part.opname in READS}
    known = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return {name: value for name, value in known.items() if is_data(value)}


def is_data(value: Any, depth: int = 0) -> bool:
    """Whether a value is plain data, or a container of them."""
    if depth > DEEPEST:  # or a container in itself
        return False
    if isinstance(value, Mapping):
        parts: Iterable[Any] = (*value, *value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    else:
        is_tensor = isinstance(value, torch.Tensor) and not (value.is_meta or value.is_quantized)
        return value is None or is_tensor or isinstance(value, PLAIN)
    return all(is_data(part, depth + 1) for part in parts)


def encode_code(code: types.CodeType, within: Within = ()) -> Iterator[Any]:
    """A function by its bytecode and what that refers to."""
    yield code.co_code
    yield from encode([code.co_names, code.co_varnames], within)
    for constant in code.co_consts:
        is_code = isinstance(constant, types.CodeType)
        yield from encode_code(constant, within) if is_code else encode(constant, within)


def encode_other(value: Any, within: Within = ()) -> Iterator[Any]:
    """A value by what a pickle holds, with sets in one order."""
    try:
        yield Hasher(within).hash(value).encode()
    except Exception as error:  # pickling raises anything
        raise TypeError(
            f"memory= can't detect whether {value!r} has changed, because it can't be pickled "
            f"({error}). Pass an object that can be pickled, or memory=None."
        ) from error
