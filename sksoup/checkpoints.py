"""The collection: named checkpoints of one architecture, opened lazily, never changed."""

from __future__ import annotations

import copy
import glob
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ._formats import (
    FOLDER_WEIGHTS,
    SUFFIXES,
    Read,
    TensorInfo,
    check_state_dict,
    find_weights,
    list_weights,
    open_weights,
    write_safetensors,
)
from ._hub import HubModule, hub_folder
from .exceptions import CheckpointError

__all__ = ["CheckpointCollection"]

PREFIXES = ("module.", "_orig_mod.", "model.")  # DDP, torch.compile, Lightning
ModuleSource: TypeAlias = nn.Module | Callable[[], nn.Module]


class _FileCheckpoint:
    """A checkpoint on disk: a path, its header, and the prefix its names carry in the file."""

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.weights = open_weights(path, key)
        self.prefix = ""

    def __repr__(self) -> str:
        return repr(str(self.path))

    @property
    def header(self) -> dict[str, TensorInfo]:
        skip = len(self.prefix)
        return {name[skip:]: info for name, info in self.weights.header.items()}

    @property
    def name(self) -> tuple[str, ...]:
        """Folders and a stem; a file with a name all such files share goes by its folder."""
        path = self.path
        if path.is_file() and path.name in FOLDER_WEIGHTS:
            path = path.parent
        return (*path.parent.parts[1:], path.name if path.is_dir() else path.stem)

    @contextmanager
    def open(self) -> Iterator[Read]:
        with self.weights.open() as read:
            yield lambda name: read(self.prefix + name)

    def sha256(self) -> str:
        return self.weights.sha256()


class _MemoryCheckpoint:
    """A checkpoint in memory: a private copy of a state dict."""

    def __init__(self, state: Mapping[str, torch.Tensor], label: str) -> None:
        self.tensors = {
            name: value.detach().cpu().clone()
            for name, value in check_state_dict(state, label).items()
        }
        self.label = label
        self.prefix = ""
        self.raw_header = {
            name: TensorInfo(tuple(value.shape), value.dtype)
            for name, value in self.tensors.items()
        }

    def __repr__(self) -> str:
        return self.label

    @property
    def header(self) -> dict[str, TensorInfo]:
        return {name[len(self.prefix) :]: info for name, info in self.raw_header.items()}

    @contextmanager
    def open(self) -> Iterator[Read]:
        yield lambda name: self.tensors[self.prefix + name]

    def sha256(self) -> str:
        return _content_sha256(self)


_Checkpoint: TypeAlias = _FileCheckpoint | _MemoryCheckpoint


class CheckpointCollection(Mapping[str, dict[str, torch.Tensor]]):
    """Hold named checkpoints of one architecture and load their weights only when asked.

    An immutable mapping from name to state dict. Opening it reads headers; the weights of a file
    are read when a recipe, `mix` or ``collection[name]`` needs them, and let go afterwards.

    Parameters
    ----------
    checkpoints : iterable or mapping
        Paths of files (``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, an
        ``.index.json`` of shards) or of Hugging Face and skorch ``Checkpoint`` folders; modules,
        fitted skorch nets, or state dicts. A mapping gives them names. What is in memory is copied
        to the CPU, so training it further changes nothing here.
    module : callable, nn.Module, skorch net or None, default=None
        The architecture: a factory without arguments, a module (copied before use) or a skorch
        net. By default that of the first module or net given, or what the ``config.json`` of the
        first Hugging Face folder says (extra ``hub``). Needed by everything that predicts; `mix`
        and `Recipe.cook` do without.
    names : sequence of str or None, default=None
        Unique names; by default file stems (with as much of the folder as makes them unique), or
        ``checkpoint0``, ``checkpoint1``, ...
    scores : mapping of str to float or None, default=None
        Known held-out scores by name, greater is better. With them `GreedySoup` and
        `BestCheckpoint` need not rank.
    key : str or None, default=None
        Which state dict to take out of training containers that hold several, such as ``"ema"``.
        A container with one needs no key.

    Attributes
    ----------
    names : tuple of str
        Names in order; the order of the last axis of ``coef_``.
    layout : dict of str to TensorInfo
        Shape and dtype of every tensor, without reading any; the dtype is the promoted one where
        checkpoints differ.
    nbytes : int
        Size of one model's weights in bytes.
    scores : dict of str to float or None
        As given.

    Raises
    ------
    CheckpointError
        No checkpoints; a file that is missing, empty, damaged, or holds more than tensors;
        checkpoints that differ in keys, shapes or kind (floating or integer). While reading: NaN or
        infinite weights, and files that changed since the collection was opened.

    Notes
    -----
    Nothing is ever unpickled unsafely and no option allows it; harmless classes that a container
    holds beside its weights become inert placeholders. The prefixes ``module.``, ``_orig_mod.``
    and ``model.`` are dropped where that makes the names fit the module, or each other. Pickling a
    collection carries the
    paths of files (not their contents) and the tensors of in-memory checkpoints. Two collections
    are equal only if they are the same object, and ``sklearn.base.clone`` returns the same
    object. An infinite value is accepted only where it is the same in every checkpoint, as in a
    buffer that masks attention; NaN never is.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection
    >>> nets = [torch.nn.Linear(2, 3) for _ in range(4)]
    >>> collection = CheckpointCollection(nets, module=lambda: torch.nn.Linear(2, 3))
    >>> collection
    CheckpointCollection(4 checkpoints, 2 tensors, 36 bytes each, in memory)
    >>> collection.names
    ('checkpoint0', 'checkpoint1', 'checkpoint2', 'checkpoint3')
    """

    def __init__(
        self,
        checkpoints: Iterable[Any] | Mapping[str, Any],
        *,
        module: ModuleSource | None = None,
        names: Sequence[str] | None = None,
        scores: Mapping[str, float] | None = None,
        key: str | None = None,
    ) -> None:
        given, names = _named(checkpoints, names)
        self.module = _architecture(given, module)
        entries = [_opened(item, index, key) for index, item in enumerate(given)]
        _drop_prefixes(entries, self.module)
        self.names: tuple[str, ...] = tuple(names) if names is not None else _default_names(entries)
        _check_names(self.names, len(entries))
        self._entries: dict[str, _Checkpoint] = dict(zip(self.names, entries, strict=True))
        self.layout: dict[str, TensorInfo] = _common_layout(self._entries)
        self.scores = _check_scores(scores, self.names)
        # per tensor: the checkpoints it was read from and passed; Inf must be equal everywhere
        self._finite: dict[str, set[str]] = {tensor: set() for tensor in self.layout}
        self._infinite: dict[str, tuple[str, torch.Tensor]] = {}
        self._hashes: dict[str, str] = {}
        self._hashing: dict[str, Future[str]] = {}

    @classmethod
    def from_path(
        cls,
        path: str | os.PathLike[str],
        *,
        module: ModuleSource | None = None,
        scores: Mapping[str, float] | None = None,
        key: str | None = None,
    ) -> CheckpointCollection:
        """Open the checkpoints of a folder or a glob pattern, in natural order.

        Parameters
        ----------
        path : str or path-like
            A folder (all checkpoints in it: files, sharded ones once, Hugging Face and skorch
            folders), a glob pattern (``"runs/**/*.safetensors"``, ``"runs/checkpoint-*"``), or
            one file or Hugging Face folder.
        module, scores, key
            As in the constructor.

        Returns
        -------
        collection : CheckpointCollection
            Ordered so that ``ft2`` comes before ``ft10``.

        Raises
        ------
        CheckpointError
            Nothing matches, or as in the constructor.

        Examples
        --------
        >>> CheckpointCollection.from_path("no/such/folder/*.pt")
        Traceback (most recent call last):
        ...
        sksoup.exceptions.CheckpointError: No checkpoints found at 'no/such/folder/*.pt': ...
        """
        root = Path(path)
        if root.is_dir():
            found = [root] if find_weights(root) else list_weights(root)
        elif root.is_file():
            found = [root]
        else:
            found = [Path(p) for p in glob.glob(os.fspath(path), recursive=True)]
        if not found:
            raise CheckpointError(
                f"No checkpoints found at {os.fspath(path)!r}: expected a folder with "
                f"{', '.join(SUFFIXES)} files, a pattern that matches some, or a file."
            )
        return cls(sorted(found, key=_natural_key), module=module, scores=scores, key=key)

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        with self.open(name) as read:
            return {tensor: read(tensor).clone() for tensor in self.layout}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointCollection:
        return self

    def __sklearn_clone__(self) -> CheckpointCollection:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hashing": {}, "_hashes": dict(self._hashes)}

    def __repr__(self) -> str:
        files = sum(isinstance(entry, _FileCheckpoint) for entry in self._entries.values())
        where = (
            "on disk" if files == len(self) else "in memory" if files == 0 else f"{files} on disk"
        )
        return (
            f"CheckpointCollection({len(self)} checkpoint{'s' * (len(self) > 1)}, "
            f"{len(self.layout)} tensors, {self.nbytes:,} bytes each, {where})"
        )

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.layout.values())

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        """Open one checkpoint and read it tensor by tensor.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Yields
        ------
        read : callable, tensor name -> tensor
            Each tensor is on the CPU in its stored dtype and may be a view of the file: copy
            what is to outlive the context, and never write to it.

        Raises
        ------
        CheckpointError
            The file changed or can't be read, or a tensor holds NaN or Inf.
        """
        entry = self._entries[name]
        with entry.open() as read_unchecked:

            def read(tensor: str) -> torch.Tensor:
                value = read_unchecked(tensor)
                self._check_finite(name, tensor, value)
                return value

            yield read

    def check(self) -> None:
        """Read every tensor that has not been read yet and raise where one is not finite.

        Raises
        ------
        CheckpointError
            As `open`, naming file and tensor.
        """
        for name in self.names:
            unread = [tensor for tensor in self.layout if name not in self._finite[tensor]]
            if unread:
                with self.open(name) as read:
                    for tensor in unread:
                        read(tensor)

    def _check_finite(self, name: str, tensor: str, value: torch.Tensor) -> None:
        """Refuse NaN anywhere, and Inf unless the tensor is the same in every checkpoint."""
        seen = self._finite[tensor]
        if name in seen:
            return
        if value.is_floating_point() and value.numel():
            # two numbers per tensor: NaN propagates into both
            low, high = torch.aminmax(value if value.dtype.itemsize > 1 else value.float())
            infinite = bool(torch.isinf(low) | torch.isinf(high))
            if bool(torch.isnan(low) | torch.isnan(high)):
                raise self._not_finite(name, tensor)
            if infinite and not seen:
                self._infinite[tensor] = (name, value.clone())
            elif infinite or tensor in self._infinite:
                first, constant = self._infinite.get(tensor, (name, None))
                if constant is None or not torch.equal(constant, value):
                    raise self._not_finite(name if infinite else first, tensor)
        seen.add(name)

    def _not_finite(self, name: str, tensor: str) -> CheckpointError:
        return CheckpointError(
            f"{self._entries[name]!r} can't be used: {tensor!r} holds NaN or infinite values. Its "
            f"run has probably diverged: leave it out with collection.drop({name!r})."
        )

    def select(self, names: Iterable[str]) -> CheckpointCollection:
        """Return a collection of these checkpoints only, in this order.

        Parameters
        ----------
        names : iterable of str
            Names of checkpoints.

        Returns
        -------
        collection : CheckpointCollection
            Shares files and tensors with this one; nothing is read.

        Raises
        ------
        KeyError
            A name is not in the collection.
        """
        chosen = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in chosen if name not in self._entries]
        if unknown:
            raise KeyError(
                f"No checkpoint named {', '.join(map(repr, unknown[:5]))} in this collection of "
                f"{len(self)}: it holds {', '.join(map(repr, self.names[:5]))}"
                f"{', ...' if len(self) > 5 else ''}."
            )
        _check_names(tuple(chosen), len(chosen))
        part = copy.copy(self)
        part.names = tuple(chosen)
        part._entries = {name: self._entries[name] for name in chosen}
        part.layout = _common_layout(part._entries)
        part.scores = None if self.scores is None else {n: self.scores[n] for n in chosen}
        part._finite = {tensor: set() for tensor in part.layout}
        part._infinite = {}
        part._hashes = {n: self._hashes[n] for n in chosen if n in self._hashes}
        part._hashing = {n: self._hashing[n] for n in chosen if n in self._hashing}
        return part

    def drop(self, names: str | Iterable[str]) -> CheckpointCollection:
        """Return a collection without these checkpoints.

        Parameters
        ----------
        names : str or iterable of str
            Names of checkpoints to leave out.

        Returns
        -------
        collection : CheckpointCollection
            The others, in order.

        Raises
        ------
        KeyError
            A name is not in the collection.
        """
        dropped = self.select([names] if isinstance(names, str) else names).names
        return self.select([name for name in self.names if name not in dropped])

    def save(self, folder: str | os.PathLike[str]) -> CheckpointCollection:
        """Write every checkpoint to ``folder`` as ``<name>.safetensors`` and open those files.

        Parameters
        ----------
        folder : str or path-like
            Created when missing.

        Returns
        -------
        collection : CheckpointCollection
            Path-backed: pickles small and holds nothing in memory.

        Raises
        ------
        FileExistsError
            A file of that name is there already; nothing is written.
        """
        root = Path(folder)
        paths = {name: root / f"{name}.safetensors" for name in self.names}
        for path in paths.values():
            if path.exists():
                raise FileExistsError(
                    f"{str(path)!r} exists. Save the collection to another folder, or move it away."
                )
        for name, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, self[name])
        return CheckpointCollection(paths, module=self.module, scores=self.scores)

    def build_module(self) -> nn.Module:
        """Build a fresh module of the architecture; global random state stays as it is.

        Returns
        -------
        module : nn.Module
            On the CPU, with whatever weights the factory gives.

        Raises
        ------
        CheckpointError
            No ``module`` was given.
        TypeError
            The factory does not return an ``nn.Module``.
        """
        if self.module is None:
            raise CheckpointError(
                "This collection has no module, so it can average weights but not predict. Give "
                "the architecture: CheckpointCollection(..., module=build_model)."
            )
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module).cpu()
        with preserved_random_state():
            module = self.module()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module={self.module!r} returned a {type(module).__name__}, expected an nn.Module."
            )
        return module.cpu()

    def start_hashing(self) -> None:
        """Begin to hash the files in one background thread, while the search reads them."""
        missing = [n for n in self.names if n not in self._hashes and n not in self._hashing]
        if missing:
            executor = ThreadPoolExecutor(1, thread_name_prefix="sksoup-sha256")
            self._hashing.update({n: executor.submit(self._entries[n].sha256) for n in missing})
            executor.shutdown(wait=False)

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a checkpoint: of its file, else of its names and values.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        digest : str
            64 hexadecimal digits, computed once.
        """
        if name not in self._hashes:
            pending = self._hashing.pop(name, None)
            self._hashes[name] = pending.result() if pending else self._entries[name].sha256()
        return self._hashes[name]

    def content_sha256(self, name: str) -> str:
        """Return the SHA-256 of a checkpoint's names, dtypes, shapes and values.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        digest : str
            64 hexadecimal digits; the same in memory and in a file of any format.
        """
        return _content_sha256(self._entries[name])

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Walk the tensors that live in this collection itself, in no file.

        Yields
        ------
        tensor : Tensor
            Not a copy: never write to it.
        """
        for entry in self._entries.values():
            if isinstance(entry, _MemoryCheckpoint):
                yield from entry.tensors.values()

    def path(self, name: str) -> Path | None:
        """Return the file of a checkpoint, or None when it lives in memory.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        path : Path or None
            Absolute.
        """
        entry = self._entries[name]
        return entry.path if isinstance(entry, _FileCheckpoint) else None


def _content_sha256(entry: _Checkpoint) -> str:
    digest = sha256()
    with entry.open() as read:
        for name, info in sorted(entry.header.items()):
            digest.update(f"{name}:{info.dtype}:{info.shape};".encode())
            digest.update(read(name).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave torch's, numpy's and Python's global random state as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _named(
    checkpoints: Iterable[Any] | Mapping[str, Any], names: Sequence[str] | None
) -> tuple[list[Any], Sequence[str] | None]:
    """Split what the user gave into items and names; refuse what is one checkpoint, not many."""
    if isinstance(checkpoints, (str, os.PathLike)):
        raise TypeError(
            f"checkpoints={os.fspath(checkpoints)!r} is one path, expected several checkpoints. "
            f"For a folder or a pattern write CheckpointCollection.from_path(...)."
        )
    if isinstance(checkpoints, nn.Module):
        raise TypeError("checkpoints is one module, expected several: put them in a list.")
    if isinstance(checkpoints, Mapping):
        if any(isinstance(value, torch.Tensor) for value in checkpoints.values()):
            raise TypeError("checkpoints is one state dict, expected several: put them in a list.")
        names = tuple(checkpoints) if names is None else names
        items = list(checkpoints.values())
    elif isinstance(checkpoints, Iterable):
        items = list(checkpoints)
    else:
        raise TypeError(
            f"checkpoints must be paths, modules or state dicts, got {type(checkpoints).__name__}."
        )
    if not items:
        raise CheckpointError("No checkpoints: expected at least one path, module or state dict.")
    return items, names


def _opened(item: Any, index: int, key: str | None) -> _Checkpoint:
    if isinstance(item, (str, os.PathLike)):
        return _FileCheckpoint(Path(item).absolute(), key)
    if isinstance(trained := getattr(item, "module_", None), nn.Module):  # a fitted skorch net
        item = trained
    if isinstance(item, nn.Module):
        item = item.state_dict()
    if isinstance(item, Mapping):
        return _MemoryCheckpoint(item, f"checkpoint {index} (in memory)")
    raise TypeError(
        f"checkpoints[{index}] is a {type(item).__name__}, expected a path, an nn.Module, a fitted "
        f"skorch net or a state dict."
    )


class _SkorchModule:
    """The architecture of a skorch net: an initialised copy's module."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self) -> nn.Module:
        module: nn.Module = copy.deepcopy(self.net).initialize().module_
        return module


def _architecture(given: Sequence[Any], module: Any) -> ModuleSource | None:
    """The module or factory to build from: as given, else the first that the checkpoints know."""
    for item in [module] if module is not None else given:
        trained = getattr(item, "module_", None)
        if isinstance(item, nn.Module) or isinstance(trained, nn.Module):
            return copy.deepcopy(item if isinstance(item, nn.Module) else trained)
        if module is None:
            if isinstance(item, (str, os.PathLike)) and (folder := hub_folder(Path(item))):
                return HubModule(folder)
        elif hasattr(item, "initialize") and hasattr(item, "get_params"):
            return _SkorchModule(item)
        elif callable(item):
            factory: ModuleSource = item
            return factory
        else:
            raise TypeError(
                f"module must be a factory without arguments, an nn.Module or a skorch net, got "
                f"{type(item).__name__}."
            )
    return None


def _drop_prefixes(entries: Sequence[_Checkpoint], module: ModuleSource | None) -> None:
    """Drop DDP's, compile's and Lightning's prefixes where that is what makes the names fit."""
    choices = [_prefixes(list(entry.header)) for entry in entries]
    if all(len(prefixes) == 1 for prefixes in choices):
        return
    wanted = _module_names(module)
    if wanted is not None:
        for entry, prefixes in zip(entries, choices, strict=True):
            names = list(entry.header)
            fits = (p for p in prefixes if {name[len(p) :] for name in names} <= wanted)
            entry.prefix = next(fits, "")
        return
    offers = [
        {frozenset(name[len(p) :] for name in entry.header): p for p in reversed(prefixes)}
        for entry, prefixes in zip(entries, choices, strict=True)
    ]
    shared = next((names for names in reversed(offers[0]) if all(names in o for o in offers)), None)
    if shared is not None:
        for entry, offer in zip(entries, offers, strict=True):
            entry.prefix = offer[shared]


def _prefixes(names: Sequence[str]) -> list[str]:
    """Every chain of known prefixes that all names begin with, the empty one first."""
    found = [""]
    while True:
        longer = next(
            (found[-1] + p for p in PREFIXES if all(n.startswith(found[-1] + p) for n in names)),
            None,
        )
        if longer is None:
            return found
        found.append(longer)


def _module_names(module: ModuleSource | None) -> set[str] | None:
    """Names in the module's state dict, built on 'meta': no memory, no initialisation."""
    if module is None or isinstance(module, nn.Module):
        return None if module is None else set(module.state_dict())
    try:
        with preserved_random_state(), torch.device("meta"):
            return set(module().state_dict())
    except Exception:  # a factory that can't be built so is built for real later
        return None


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort digits by value: ft2 before ft10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def _default_names(entries: Sequence[_Checkpoint]) -> tuple[str, ...]:
    """File stems, with leading folders where stems repeat; checkpoint0, ... for the others."""
    parts = [
        entry.name if isinstance(entry, _FileCheckpoint) else (f"checkpoint{index}",)
        for index, entry in enumerate(entries)
    ]
    depth = 1
    names = tuple(part[-1] for part in parts)
    while len(set(names)) < len(names) and depth < max(map(len, parts)):
        depth += 1
        names = tuple("/".join(part[-depth:]) for part in parts)
    if len(set(names)) < len(names):  # the same file twice, or a.pt beside a.safetensors
        names = tuple(f"{name}#{index}" for index, name in enumerate(names))
    return names


def _check_names(names: Sequence[str], n_checkpoints: int) -> None:
    if len(names) != n_checkpoints:
        raise ValueError(f"names has {len(names)} entries, expected {n_checkpoints}, one each.")
    wrong = next((name for name in names if not isinstance(name, str) or not name), None)
    if wrong is not None:
        raise TypeError(f"names must be non-empty strings, got {wrong!r}.")
    repeated = next((name for name in names if list(names).count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"names must be unique, got {repeated!r} more than once.")
    if not names:
        raise CheckpointError("No checkpoints are left: expected at least one.")


def _check_scores(
    scores: Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, float] | None:
    if scores is None:
        return None
    missing = [name for name in names if name not in scores]
    if missing:
        raise ValueError(
            f"scores lacks {', '.join(map(repr, missing[:5]))} ({len(missing)} of {len(names)}); "
            f"give every checkpoint one, or none."
        )
    known = {name: float(scores[name]) for name in names}
    bad = next((name for name, score in known.items() if not np.isfinite(score)), None)
    if bad is not None:
        raise ValueError(f"scores[{bad!r}] is {known[bad]}, expected a finite number.")
    return known


def _common_layout(entries: Mapping[str, _Checkpoint]) -> dict[str, TensorInfo]:
    """The tensors that all checkpoints share, with promoted dtypes; raise where they differ."""
    first = next(iter(entries.values()))
    layout = dict(first.header)
    for tensor, info in layout.items():
        if info.dtype.is_complex:
            raise CheckpointError(
                f"{first!r} can't be used: {tensor!r} is complex, expected floating or integer."
            )
    for name, entry in list(entries.items())[1:]:
        _check_same_keys(name, entry, first)
        for tensor, info in entry.header.items():
            expected = layout[tensor]
            if info.shape != expected.shape:
                raise CheckpointError(
                    f"{entry!r} cannot join this collection: {tensor!r} has shape {info.shape}, "
                    f"expected {expected.shape} as in {first!r}. All checkpoints must share one "
                    f"architecture; leave {name!r} out."
                )
            if info.is_floating != expected.is_floating or info.dtype.is_complex:
                raise CheckpointError(
                    f"{entry!r} cannot join this collection: {tensor!r} has dtype {info.dtype}, "
                    f"expected a {'floating' if expected.is_floating else 'integer'} one as in "
                    f"{first!r} ({expected.dtype}); leave {name!r} out."
                )
            promoted = torch.promote_types(info.dtype, expected.dtype)
            layout[tensor] = TensorInfo(info.shape, promoted)
    return layout


def _check_same_keys(name: str, entry: _Checkpoint, first: _Checkpoint) -> None:
    lacking = [tensor for tensor in first.header if tensor not in entry.header]
    extra = [tensor for tensor in entry.header if tensor not in first.header]
    if not lacking and not extra:
        return
    differences = [
        f"it {verb} {', '.join(map(repr, keys[:5]))}"
        + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        for verb, keys in (("lacks", lacking), ("adds", extra))
        if keys
    ]
    raise CheckpointError(
        f"{entry!r} cannot join this collection: {' and '.join(differences)}, compared with "
        f"{first!r}. All checkpoints must share one architecture; leave {name!r} out."
    )
