"""Convert tensor names of Hugging Face files to those of the module, where they differ.

Tensors are renamed and merged as in ``from_pretrained``, with the same table, but one at a time and
without reading them in advance.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..exceptions import CheckpointError
from .architecture import ModuleSource, skeleton
from .computed import LONGEST_MATCHED, ignored_names
from .hub import HubModule, hub_folder
from .in_memory import content_sha256
from .low_rank import LowRankCheckpoint
from .prefixes import prefixes_of
from .protocol import Checkpoint, Entry, Read, TensorInfo
from .sources import open_checkpoint


@dataclass(frozen=True)
class Conversion:
    """Tensors computed from others in a file, such as merged experts or a split matrix."""

    transform: Any  # a WeightConverter
    first: str  # the first of the resulting tensors
    sources: tuple[tuple[str, str], ...]  # each tensor in the file, and its pattern

    def run(self, read: Read, network: Any) -> dict[str, torch.Tensor]:
        """The tensors computed from those that ``read`` returns."""
        transform = copy.deepcopy(self.transform)  # it accumulates its inputs
        for name, pattern in self.sources:
            transform.add_tensor(self.first, name, pattern, read(name))
        made = transform.convert(self.first, model=network, config=network.config)
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}


Origin: TypeAlias = str | Conversion  # a name in the file, or what is computed from several


@dataclass(frozen=True)
class Plan:
    """The origins of a module's tensors (after a wrapper's prefix), their shapes and dtypes."""

    prefix: str
    origins: Mapping[str, Origin]
    header: Mapping[str, TensorInfo]

    @cached_property
    def read(self) -> set[str]:
        """Names in the file of the tensors that are read."""
        made = [one for one in self.origins.values() if isinstance(one, Conversion)]
        names = {one for one in self.origins.values() if isinstance(one, str)}
        return names.union(*({name for name, _ in one.sources} for one in made))


class Target:
    """A transformers model, and what is found in it once for all files."""

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        self.state = network.state_dict()
        # older versions stored tensors that modules compute when they are built, such as positions
        # and masks
        self.unsaved = {name for name, _ in network.named_buffers()} - self.state.keys()
        table = _table(network)
        self._transforms = [] if table is None else table(network)

    def transforms(self) -> list[Any]:
        """The entries of transformers' conversion table; copies, as some have a state."""
        return copy.deepcopy(self._transforms)

    def ignored(self, names: Iterable[str]) -> set[str]:
        """Those of these names that are not the model's, and that ``from_pretrained`` ignores."""
        return ignored_names(self.network, {*names} - self.state.keys())


class ConvertedCheckpoint(Checkpoint):
    """A checkpoint with the tensor names of a module; its digest is that of the file."""

    def __init__(self, entry: Entry, plan: Plan, network: nn.Module) -> None:
        self.entry = entry
        self.header = plan.header
        self.path, self.key = entry.checkpoint.path, entry.checkpoint.key
        self.is_soup = entry.is_soup
        self._origins = plan.origins
        # tensors of the file that the module computes, so that they are not read
        self.unread = {entry.prefix + n: i for n, i in entry.header.items() if n not in plan.read}
        self._is_computed = any(isinstance(origin, Conversion) for origin in self._origins.values())
        self._network = network if self._is_computed else None

    def __repr__(self) -> str:
        return repr(self.entry)

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Read tensors by the module's names, and compute them on each read where needed."""
        with self.entry.checkpoint.open() as read_stored:

            def stored(name: str) -> torch.Tensor:
                return read_stored(self.entry.prefix + name)

            def read(name: str) -> torch.Tensor:
                origin = self._origins[name]
                if isinstance(origin, str):
                    return stored(origin)
                return origin.run(stored, self._network)[name]

            yield read

    def identity(self) -> tuple[Any, ...]:
        """The identity of the file, and the version of transformers if it computes tensors."""
        by = [sys.modules["transformers"].__version__] if self._is_computed else []
        return (self.entry.prefix, *self.entry.checkpoint.identity(), "converted", *by)

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of the file, or without a file of the names and values after the prefix."""
        if self.path is None:
            return content_sha256(Entry(self, prefix))
        return self.entry.checkpoint.sha256(self.entry.prefix)

    def warm(self) -> None:
        """Ask the operating system to read the file into its cache."""
        self.entry.checkpoint.warm()

    def held_tensors(self) -> Iterable[torch.Tensor]:
        """The tensors that the checkpoint keeps in memory."""
        return self.entry.checkpoint.held_tensors()


def open_alike(path: Path, module: ModuleSource | None) -> Checkpoint:
    """Open a file with the tensor names of this module, as transformers would.

    Prefixes of wrappers (DDP, torch.compile) are not removed, but that of the model itself may be.
    """
    (entry,) = convert_names([Entry(open_checkpoint(path), prefix="", is_given=True)], module)
    return entry.checkpoint


def convert_names(entries: Sequence[Entry], module: ModuleSource | None) -> list[Entry]:
    """Rename tensors to the module's names if it is a transformers model and they differ."""
    entries = [unconverted(entry) for entry in entries]
    network = _network(entries, module)
    if network is None:
        return entries
    target = Target(network)
    planned: dict[tuple[Any, ...], Plan | None] = {}  # most files have the same names
    converted = []
    for entry in entries:
        if isinstance(entry.checkpoint, LowRankCheckpoint):  # already has the module's names
            converted.append(entry)
            continue
        kind = _is_in_hub_folder(entry), entry.prefix, frozenset(entry.checkpoint.header.items())
        if kind not in planned:
            planned[kind] = _plan(entry, target, is_stored=kind[0])
        plan = planned[kind]
        if plan is None:
            converted.append(entry)
        else:
            inner = Entry(entry.checkpoint, plan.prefix, entry.is_given)
            converted.append(Entry(ConvertedCheckpoint(inner, plan, network)))
    return converted


def unconverted(entry: Entry) -> Entry:
    """The same tensors by the names in files."""
    found = entry.checkpoint
    return found.entry if isinstance(found, ConvertedCheckpoint) else entry


def stored_names(module: Any, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A module's weights as transformers' ``save_pretrained`` would write them."""
    if _table(module) is None:
        return weights
    from transformers.core_model_loading import revert_weight_conversion

    stored: Mapping[str, torch.Tensor] = revert_weight_conversion(module, dict(weights))
    return stored


def _network(entries: Sequence[Entry], module: ModuleSource | None) -> nn.Module | None:
    """The module if it is a transformers model, on 'meta' if it has to be built; or None."""
    stored = next(filter(_is_in_hub_folder, entries), None)
    # a factory is called only if it may build such a model
    if stored is None and not isinstance(module, nn.Module) and "transformers" not in sys.modules:
        return None
    network = skeleton(module)
    tried = module is None or isinstance(module, HubModule)
    if network is None and not tried and stored is not None:
        # some factories, such as from_pretrained, can't build on 'meta'; the folder has the names
        path = stored.checkpoint.path or Path()
        network = skeleton(HubModule(hub_folder(path) or path, path, stored.checkpoint.key))
    return None if network is None or _table(network) is None else network


def _table(network: nn.Module) -> Callable[..., list[Any]] | None:
    """The function that returns transformers' conversion table; None for other modules."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(network, transformers.PreTrainedModel):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before version 5, files have the names of modules
        return None
    table: Callable[..., list[Any]] = get_model_conversion_mapping
    return table


def _is_in_hub_folder(entry: Entry) -> bool:
    path = entry.checkpoint.path
    is_whole = not isinstance(entry.checkpoint, LowRankCheckpoint)
    return is_whole and path is not None and hub_folder(path) is not None


def _plan(entry: Entry, target: Target, is_stored: bool) -> Plan | None:
    """How to convert a checkpoint, by its header; None if its names are the module's."""
    wanted = target.state.keys()
    prefixes = [entry.prefix] if entry.is_given or entry.prefix else prefixes_of([*entry.header])
    for prefix in prefixes:  # the first after which all names become the module's
        tried = Entry(entry.checkpoint, prefix)
        renamed = _rename(tried.header, target)
        found = {new for new, *_ in renamed}
        if found - target.ignored(found) <= wanted:
            break
    else:
        tried = Entry(entry.checkpoint, entry.prefix)
        renamed = _rename(tried.header, target)
    if not is_stored and tried.header.keys() <= wanted:  # not written by transformers
        return None
    origins, computed = _origins(tried, target, renamed)
    if (
        not computed
        and tried.prefix == entry.prefix
        and {*origins.items()} == {(name, name) for name in tried.header}
    ):
        return None
    header = {new: tried.header[name] for new, name in origins.items()}

    def read_shape(name: str) -> torch.Tensor:
        info = tried.header[name]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    made: dict[str, Origin] = {}
    for conversion in computed:
        try:
            values = conversion.run(read_shape, target.network)
        except Exception as error:
            names = [name for name, _ in conversion.sources]
            raise CheckpointError(
                f"{entry!r} can't be opened: transformers can't convert {names[0]!r} ({len(names)} "
                f"tensors) to {conversion.first!r}: {error}. Save it again from transformers."
            ) from error
        if twice := values.keys() & header.keys():
            raise CheckpointError(
                f"{entry!r} can't be opened: it holds {min(twice)!r} twice, as one tensor and in "
                f"parts ({conversion.sources[0][0]!r}, ...), and other programs may read the other "
                f"one. Save it again from transformers."
            )
        made |= dict.fromkeys(values, conversion)
        header |= {name: TensorInfo.of(value) for name, value in values.items()}
    return Plan(tried.prefix, {**origins, **made}, header)


def _rename(names: Iterable[str], target: Target) -> list[tuple[str, str, Any, str]]:
    """For each name in a file: the module's name, the name, its converter and the pattern."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    transforms = target.transforms()
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state, base = target.state, target.network.base_model_prefix
    renamed = []
    for name in sorted(names, key=_by_number):  # so that experts are in order
        new, pattern = name, ""
        if len(name) <= LONGEST_MATCHED:
            new, matched = rename_source_key(name, renamings, converters, base, state)
            pattern = matched or ""
            if new not in state and name in state:  # it already was the module's
                new, pattern = name, ""
        renamed.append((new, name, by_pattern.get(pattern), pattern))
    return renamed


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Sort the numbers between dots by value: 2 before 10."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 20 else (1, 0, part)
        for part in name.split(".")
    ]


def _origins(
    entry: Entry, target: Target, renamed: Sequence[tuple[str, str, Any, str]]
) -> tuple[dict[str, str], list[Conversion]]:
    """Names in the file by those in the module, and conversions of several tensors."""
    unsaved = target.unsaved | target.ignored(new for new, *_ in renamed)
    origins: dict[str, str] = {}
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for new, name, converter, pattern in renamed:
        if new in unsaved:
            continue
        if converter is not None:
            collected.setdefault(new, (converter, []))[1].append((name, pattern))
        elif origins.setdefault(new, name) != name:
            raise CheckpointError(
                f"{entry!r} can't be opened: {origins[new]!r} and {name!r} both correspond to "
                f"{new!r} in {type(target.network).__name__}. Save it again from transformers."
            )
    computed = [Conversion(by, new, tuple(found)) for new, (by, found) in collected.items()]
    return origins, computed
