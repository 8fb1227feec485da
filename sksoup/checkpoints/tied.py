"""Tied weights that some checkpoints store by all of their names, and others only by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace

from ..exceptions import CheckpointError
from .architecture import ModuleSource, skeleton
from .base_model import tied_names
from .computed import counters_of, unsaved_names
from .in_memory import place_of
from .protocol import Entry, Read, same_bits


def drop_copies(
    entries: Sequence[Entry], module: ModuleSource | None, wanted: Set[str] | None = None
) -> list[Entry]:
    """Leave out names that only some checkpoints have, if the module does not need them.

    ``state_dict()`` has all names of tied weights, and tensors that transformers models compute;
    ``save_pretrained`` stores tied weights once, and no computed tensors. A name is left out if the
    module ties it to one that all checkpoints have (``wanted``, if given), and both have the same
    values. Without a module they must have the same memory. Old files lack BatchNorm's counters.
    """
    headers = {id(entry.header): entry.header for entry in entries}.values()  # may be shared
    names = [header.keys() for header in headers]
    if wanted is None:
        wanted = set(names[0]).intersection(*names[1:])
    if all(one <= wanted for one in names):
        return list(entries)
    network = skeleton(module)
    counters = [counters_of(entry.header) - wanted for entry in entries]
    if network is None:
        return [
            _without(entry, _same_memory(entry, wanted) | more)
            for entry, more in zip(entries, counters, strict=True)
        ]
    unsaved, tied = unsaved_names(network), tied_names(network)
    found = []
    for entry, more in zip(entries, counters, strict=True):
        copies = _same_values(entry, wanted, tied)
        found.append(_without(entry, copies | more | (entry.header.keys() & unsaved - wanted)))
    return found


def _without(entry: Entry, names: set[str]) -> Entry:
    return replace(entry, without=frozenset(names)) if names else entry


def _same_values(entry: Entry, wanted: Set[str], tied: Iterable[Sequence[str]]) -> set[str]:
    """Further names of tied weights; raise an error if the checkpoint has other values by them."""
    pairs = []
    for same in tied:
        names = [name for name in same if name in entry.header]
        first = next((name for name in names if name in wanted), "")
        if first and not wanted >= {*names}:
            pairs += [(name, first) for name in names if name != first]
    if not pairs:
        return set()
    with _opened(entry) as read:
        for name, other in pairs:
            same_shape = entry.header[name].shape == entry.header[other].shape
            if not same_shape or not same_bits(read(name), read(other)):
                raise CheckpointError(
                    f"{entry!r} cannot join this collection: {name!r} has other values than "
                    f"{other!r} in it, so these weights are not tied, but the module ties them, "
                    f"and other checkpoints store only {other!r}. Leave this checkpoint out."
                )
    return {name for name, _ in pairs} - wanted


def _same_memory(entry: Entry, wanted: Set[str]) -> set[str]:
    """Further names of tensors that have the memory of another one."""
    more = {name: info for name, info in entry.header.items() if name not in wanted and info.nbytes}
    if not more or not entry.checkpoint.shares_memory:
        return set()
    infos = set(more.values())
    with _opened(entry) as read:
        places = {place_of(read(name)) for name in wanted if entry.header.get(name) in infos}
        return {name for name in more if place_of(read(name)) in places}


@contextmanager
def _opened(entry: Entry) -> Iterator[Read]:
    with entry.checkpoint.open() as read:
        yield lambda name: read(entry.prefix + name)
