"""Deep copies of networks that compute with weights of their own."""

from __future__ import annotations

import copy
import dis
import gc
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn

from .memory import is_out_of_memory

Network = TypeVar("Network", bound=nn.Module)
EMPTY = object()  # the content of a variable that has no value yet
MOST = 100_000  # objects that are looked at in an attribute or a factory
WIDEST = 1000  # of these in one object of a factory
PLAIN = (str, int, float, bool, bytes, type(None))  # which refer to nothing
# the modules with tensors in what factories returned, by their ids and the places of these tensors
BUILT: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def copied(network: Network) -> Network:
    """A deep copy, in which functions refer to the copy, too; raise an error if they can't.

    `copy.deepcopy` copies no functions: one that is set as an attribute or a hook of a network,
    such as ``net.forward = torch.compile(net.forward)``, would still call the original's layers.
    """
    memo: dict[int, Any] = {}
    try:
        found = copy.deepcopy(network, memo)
    except Exception as error:  # of any attribute
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"A copy of {type(network).__name__} can't be made ({error}). Remove the attribute "
            f"that can't be copied, pass its state_dict(), or a function that builds the network: "
            f"module=build_model."
        ) from error
    original = Original(network)
    for name, module in found.named_modules():
        for attribute, value in [*vars(module).items()]:
            if not original.is_called_in(value):
                continue
            vars(module)[attribute] = _rebound(value, original, memo)
            if original.is_called_in(vars(module)[attribute]):
                raise ValueError(
                    f"A copy of {type(network).__name__} can't be made: {attribute!r} of "
                    f"{repr(name) if name else 'the network'} is or holds a function that finds "
                    f"the network itself as a global variable, so a copy would compute with the "
                    f"weights of the original. Define it as a method, remove it, or pass a "
                    f"function that builds the network: module=build_model."
                )
    return found


def refers_to_itself(network: nn.Module) -> bool:
    """Whether a function of the network refers to it, so that `copy.deepcopy` is no full copy."""
    held = (value for module in network.modules() for value in vars(module).values())
    return any(map(Original(network).is_called_in, held))


def of_its_own(network: Network, factory: Any) -> Network:
    """What a factory returned; a copy if the factory keeps it, or has returned a part of it before.

    Otherwise all soups would be one network, such as with ``module=lambda: network``.
    """
    keys = {key: part for part in network.modules() for key in _keys(part)}
    before = {key: BUILT.get(key) for key in keys}
    is_built = any(part is not None and key in _keys(part) for key, part in before.items())
    if is_built or Original(network).is_kept_by(factory):
        return copied(network)
    BUILT.update(keys)
    return network


class Original:
    """A network, and what was found not to refer to it, so that this is looked at once."""

    def __init__(self, network: nn.Module) -> None:
        tensors = (*network.parameters(), *network.buffers())
        # the ids of its modules and tensors, and where the values of these are
        self._parts = {id(x) for x in (*network.modules(), *tensors)} | {*map(_place, tensors)}
        self._parts -= {0}
        self._others: set[tuple[int, bool]] = set()

    def is_called_in(self, value: Any, is_shared: bool = False) -> bool:
        """Whether a function in ``value`` refers to a part of the network."""
        todo, seen = [(value, is_shared)], set[tuple[int, bool]]()
        while todo and len(seen) < MOST:
            value, is_shared = todo.pop()  # what is reached through a function is not copied
            if is_shared and self._has(value):
                return True
            key = (id(value), is_shared)
            if key in seen or key in self._others:
                continue
            seen.add(key)
            is_shared = is_shared or isinstance(value, FunctionType)
            todo += [(x, is_shared) for x in _within(value, is_shared) if type(x) not in PLAIN]
        if not todo:
            self._others |= seen
        return False

    def is_kept_by(self, factory: Any) -> bool:
        """Whether a part of the network is in the variables of a factory, or in objects there."""
        # those that are near first: that of transformers' Trainer is before its data
        todo, seen, n_found = deque([factory]), set[int](), 0
        if isinstance(factory, type):
            todo = deque([factory.__init__, *vars(factory).values()])  # type: ignore[misc]
        while todo and n_found < MOST:
            value = todo.popleft()
            if self._has(value):
                return True
            if id(value) not in seen:
                seen.add(id(value))
                found = _held(value)
                n_found += len(found)
                todo += [x for x in found if type(x) not in PLAIN]
        return False

    def _has(self, value: Any) -> bool:
        return id(value) in self._parts or _place(value) in self._parts


def _keys(module: nn.Module) -> set[int]:
    """The id of a module that has tensors itself, and where the values of these are now."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return {id(module), *map(_place, tensors)} - {0} if tensors else set()


def _place(value: Any) -> int:
    """A negative number for the memory of a tensor or array, so that it is no id; 0 for others."""
    if issubclass(type(value), np.ndarray):
        return -int(value.ctypes.data)
    if not issubclass(type(value), torch.Tensor):
        return 0
    try:
        return -int(value.untyped_storage().data_ptr())
    except (RuntimeError, ValueError):  # of another kind, or lazy
        return 0


def _rebound(value: Any, original: Original, memo: dict[int, Any]) -> Any:
    """A copied attribute, in which functions are replaced by ones that refer to the copy."""
    if isinstance(value, FunctionType):
        return _rebound_function(value, original, memo)
    again = partial(_rebound, original=original, memo=memo)
    if isinstance(value, MethodType):
        return MethodType(again(value.__func__), value.__self__)
    if isinstance(value, partial):
        keywords = {name: again(x) for name, x in value.keywords.items()}
        return partial(again(value.func), *map(again, value.args), **keywords)
    if isinstance(value, dict):
        for key, x in [*value.items()]:
            value[key] = again(x)
    elif isinstance(value, list):
        value[:] = map(again, value)
    elif type(value) in (tuple, set, frozenset):
        return type(value)(map(again, value))
    return value


def _rebound_function(value: FunctionType, original: Original, memo: dict[int, Any]) -> Any:
    """A function like this one, with copies of what it refers to of the original network."""
    if id(value) in memo or not original.is_called_in(value):
        return memo.get(id(value), value)

    def of_copy(x: Any) -> Any:
        if not isinstance(x, FunctionType) and original.is_called_in(x, is_shared=True):
            x = copy.deepcopy(x, memo)
        return _rebound(x, original, memo)

    cells = tuple(CellType() for _ in value.__closure__ or ())
    made = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = made  # it may refer to itself
    made.__defaults__ = value.__defaults__ and tuple(map(of_copy, value.__defaults__))
    if value.__kwdefaults__:
        made.__kwdefaults__ = {k: of_copy(x) for k, x in value.__kwdefaults__.items()}
    made.__dict__.update({k: of_copy(x) for k, x in vars(value).items()})
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(value, name))
    for cell, old in zip(cells, value.__closure__ or (), strict=True):
        if (held := _content(old)) is not EMPTY:
            cell.cell_contents = of_copy(held)
    return made


def _within(value: Any, is_shared: bool) -> Iterator[Any]:
    """What a function, a method or a container refers to; also a module that a function has."""
    if isinstance(value, FunctionType):
        yield from (
            held for cell in value.__closure__ or () if (held := _content(cell)) is not EMPTY
        )
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()  # what it wraps
        for name in _globals(value.__code__):
            found = value.__globals__.get(name)
            if isinstance(found, (nn.Module, torch.Tensor, MethodType, partial)):
                yield found
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, nn.Module) and is_shared:
        yield from (*value.modules(), *value.parameters(), *value.buffers())


def _held(value: Any) -> list[Any]:
    """What an object, maybe a proxy, refers to; of a large one, the first.

    Of classes and modules of Python, only what a function names: ``models.network``.
    """
    if type(value) is FunctionType:
        used = [value.__globals__.get(name) for name in _globals(value.__code__)]
        spaces = [vars(x) for x in used if issubclass(type(x), (type, ModuleType))]
        used += [
            space[name] for space in spaces for name in _names(value.__code__) if name in space
        ]
        default = (value.__defaults__, value.__kwdefaults__)
        return [*used, *default, *(value.__closure__ or ()), vars(value)]
    if issubclass(type(value), (type, ModuleType)):
        return []
    return gc.get_referents(value)[:WIDEST]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def _names(code: CodeType) -> Iterator[str]:
    """The names in the code of a function and of those in it, such as of attributes."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _globals(code: CodeType) -> Iterator[str]:
    """The global names in the code of a function and of those in it."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)
