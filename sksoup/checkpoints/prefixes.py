"""Remove the prefixes that wrappers add to all names of a network, if the names then match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..exceptions import CheckpointError
from .architecture import ModuleSource, module_names
from .protocol import Entry

PREFIXES = ("module.", "_orig_mod.", "model.")  # DDP, torch.compile, Lightning
CHAIN = 8  # maximum number of nested wrappers


def take_prefix(entries: Sequence[Entry], prefix: str) -> list[Entry]:
    """Select the tensors whose names start with a prefix; raise an error if there are none."""
    taken = [Entry(entry.checkpoint, prefix, is_given=True) for entry in entries]
    for entry in taken:
        if not entry.header:
            names = list(entry.checkpoint.header)
            raise CheckpointError(
                f"{entry!r} can't be opened with prefix={prefix!r}: no tensor name starts with it. "
                f"Its names are "
                f"{', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}."
            )
    return taken


def drop_prefixes(entries: Sequence[Entry], module: ModuleSource | None) -> list[Entry]:
    """Remove known prefixes if the names then match; prefixes passed by the user are kept."""
    if any(entry.is_given for entry in entries):
        return list(entries)
    if any(len(prefixes_of(list(entry.checkpoint.header))) > 1 for entry in entries):
        return fit_names(entries, module_names(module))
    return [replace(entry, prefix="") for entry in entries]


def fit_names(entries: Sequence[Entry], wanted: set[str] | None) -> list[Entry]:
    """Remove the prefixes so that the names match the wanted ones, or each other."""
    names = [list(entry.checkpoint.header) for entry in entries]
    choices = [prefixes_of(some) for some in names]
    fitting = [""] * len(entries)
    if wanted is not None:
        fitting = [
            next((p for p in prefixes if {name[len(p) :] for name in some} <= wanted), "")
            for some, prefixes in zip(names, choices, strict=True)
        ]
    else:
        offers = [
            {frozenset(name[len(p) :] for name in some): p for p in reversed(prefixes)}
            for some, prefixes in zip(names, choices, strict=True)
        ]
        alike = (found for found in reversed(offers[0]) if all(found in o for o in offers))
        if (shared := next(alike, None)) is not None:
            fitting = [offer[shared] for offer in offers]
    return [replace(entry, prefix=p) for entry, p in zip(entries, fitting, strict=True)]


def prefixes_of(names: Sequence[str]) -> list[str]:
    """Every chain of known prefixes that all names begin with, the empty one first."""
    found = [""]
    while names and len(found) <= CHAIN:
        longer = next(
            (found[-1] + p for p in PREFIXES if all(n.startswith(found[-1] + p) for n in names)),
            None,
        )
        if longer is None:
            break
        found.append(longer)
    return found
