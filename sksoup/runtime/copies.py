"""Deep copies of networks that compute with weights of their own."""

from __future__ import annotations

import copy
import dis
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)
MOST = 100_000  # objects that are looked at in an attribute
# the modules with tensors in what factories returned, by their ids
BUILT: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def copied(network: Network) -> Network:
    """A deep copy; raise an error if it would compute with weights of the original.

    Functions are not copied. One that is set as an attribute or a hook of a network, such as
    ``net.forward = torch.compile(net.forward)``, still calls the layers of the original.
    """
    found = copy.deepcopy(network)
    originals = _parts(network)
    for name, module in found.named_modules():
        for attribute, value in vars(module).items():
            if _calls(value, originals):
                raise ValueError(
                    f"A copy of {type(network).__name__} can't be made: {attribute!r} of "
                    f"{repr(name) if name else 'the network'} is or holds a function that refers "
                    f"to the network itself, so a copy would compute with the weights of the "
                    f"original. Define it as a method, remove it, or pass a function that builds "
                    f"the network: module=build_model."
                )
    return found


def of_its_own(network: Network, factory: Any) -> Network:
    """What a factory returned; a copy if the factory keeps it, or has returned a part of it before.

    Otherwise all soups would be one network, such as with ``module=lambda: network``.
    """
    owners = [
        part
        for part in network.modules()
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    ]
    is_kept = _calls(factory, _parts(network), is_shared=True)
    if is_kept or any(BUILT.get(id(part)) is part for part in owners):
        return copied(network)
    BUILT.update({id(part): part for part in owners})
    return network


def _parts(network: nn.Module) -> set[int]:
    """The ids of its modules and tensors."""
    return {id(x) for x in (*network.modules(), *network.parameters(), *network.buffers())}


def _calls(value: Any, parts: set[int], is_shared: bool = False) -> bool:
    """Whether a function in ``value`` refers to one of the objects with these ids."""
    todo, seen = [(value, is_shared)], set[tuple[int, bool]]()
    while todo and len(seen) < MOST:
        value, is_shared = todo.pop()  # what is reached through a function is not copied
        if is_shared and id(value) in parts:
            return True
        if (id(value), is_shared) not in seen:
            seen.add((id(value), is_shared))
            is_shared = is_shared or isinstance(value, FunctionType)
            todo += [(inner, is_shared) for inner in _within(value)]
    return False


def _within(value: Any) -> Iterator[Any]:
    """What a function, a method or a container refers to."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it is empty
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()  # what it wraps
        for step in dis.get_instructions(value):
            found = value.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
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
