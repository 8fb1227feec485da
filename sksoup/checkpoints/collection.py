"""The collection: named checkpoints of one architecture, opened lazily, never changed."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..exceptions import CheckpointError
from .describe import CheckpointSummary, CollectionSummary, describe, sample, strangers_among
from .read import (
    Read,
    TensorInfo,
    write_safetensors,
)
from .sources import (
    Checkpoint,
    FileCheckpoint,
    MemoryCheckpoint,
    ModuleSource,
    content_sha256,
    default_names,
    drop_prefixes,
    find_architecture,
    find_checkpoints,
    fit_names,
    open_source,
    preserved_random_state,
    take_prefix,
)

__all__ = ["CheckpointCollection", "CheckpointSummary", "CollectionSummary"]


class CheckpointCollection(Mapping[str, dict[str, torch.Tensor]]):
    """Hold named checkpoints of one architecture and load their weights only when asked.

    An immutable mapping from name to state dict. Opening it reads headers; the weights of a file
    are read when a recipe, `mix` or ``collection[name]`` needs them, and let go afterwards.

    Parameters
    ----------
    checkpoints : iterable or mapping
        Paths of files (``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, an
        ``.index.json`` of shards) or of Hugging Face and skorch ``Checkpoint`` folders; modules,
        fitted skorch nets, or state dicts; or a collection, opened again without a read, to give it
        a module or scores. A mapping gives them names. What is in memory is copied
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
    prefix : str or None, default=None
        Take only the tensors whose names begin with this, such as ``"model."`` of a Lightning file
        that holds a loss's or a metric's tensors beside the network's, and leave it out of their
        names. By default ``module.``, ``_orig_mod.`` and ``model.`` are dropped where that makes
        all names fit the module, or each other.

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
    holds beside its weights become inert placeholders. Pickling a collection carries the
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

    module: ModuleSource | None
    scores: dict[str, float] | None

    def __init__(
        self,
        checkpoints: Iterable[Any] | Mapping[str, Any],
        *,
        module: ModuleSource | None = None,
        names: Sequence[str] | None = None,
        scores: Mapping[str, float] | None = None,
        key: str | None = None,
        prefix: str | None = None,
    ) -> None:
        if isinstance(checkpoints, CheckpointCollection):
            module = checkpoints.module if module is None else module
            scores = checkpoints.scores if scores is None and names is None else scores
            checkpoints = checkpoints._entries
        given, names = _named(checkpoints, names)
        self.module = find_architecture(given, module)
        entries = [open_source(item, index, key) for index, item in enumerate(given)]
        if prefix is None:
            drop_prefixes(entries, self.module)
        else:
            take_prefix(entries, prefix)
        self.names: tuple[str, ...] = tuple(names) if names is not None else default_names(entries)
        _check_names(self.names, len(entries))
        self._entries: dict[str, Checkpoint] = dict(zip(self.names, entries, strict=True))
        self.layout: dict[str, TensorInfo] = _common_layout(self._entries)
        self.scores = _check_scores(scores, self.names)
        # per tensor: the checkpoints it was read from and passed; Inf must be equal everywhere
        self._finite: dict[str, set[str]] = {tensor: set() for tensor in self.layout}
        self._infinite: dict[str, tuple[str, torch.Tensor]] = {}
        self._samples: dict[str, dict[str, NDArray[np.float64]]] = {}
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
        prefix: str | None = None,
    ) -> Self:
        """Open the checkpoints of a folder or a glob pattern, in natural order.

        Parameters
        ----------
        path : str or path-like
            A folder (all checkpoints in it: files, sharded ones once, Hugging Face and skorch
            folders), a glob pattern (``"runs/**/*.safetensors"``, ``"runs/checkpoint-*"``), or
            one file or Hugging Face folder.
        module, scores, key, prefix
            As in the constructor.

        Returns
        -------
        collection : CheckpointCollection
            Ordered so that ``ft2`` comes before ``ft10``.

        Raises
        ------
        CheckpointError
            Nothing matches; a folder is a checkpoint and holds more; or as in the constructor.

        Examples
        --------
        >>> CheckpointCollection.from_path("no/such/folder/*.pt")
        Traceback (most recent call last):
        ...
        sksoup.exceptions.CheckpointError: No checkpoints found at 'no/such/folder/*.pt': ...
        """
        found = find_checkpoints(path)
        return cls(found, module=module, scores=scores, key=key, prefix=prefix)

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
        if multiprocessing.parent_process() is None:  # searches clone before they send to workers
            self.n_threads_of_parent = torch.get_num_threads()
        return self

    def __getstate__(self) -> dict[str, Any]:
        unread: dict[str, Any] = {tensor: set() for tensor in self.layout}
        memos = {"_hashing": {}, "_finite": unread, "_infinite": {}, "_samples": {}}
        return {**self.__dict__, **memos}

    def __repr__(self) -> str:
        files = sum(isinstance(entry, FileCheckpoint) for entry in self._entries.values())
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

    def warm(self, name: str) -> None:
        """Have the operating system read a checkpoint's file into its cache, in the background.

        Parameters
        ----------
        name : str
            Name of the checkpoint; one in memory is warm already.
        """
        entry = self._entries[name]
        if isinstance(entry, FileCheckpoint):
            entry.weights.warm()

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
            if value.ndim > 1:
                self._samples.setdefault(name, {})[tensor] = sample(value)
            if bool(torch.isnan(low) | torch.isnan(high)):
                raise self._not_finite(name, tensor)
            if infinite and not seen:
                self._infinite[tensor] = (name, value.clone())
            elif infinite or tensor in self._infinite:
                first, constant = self._infinite.get(tensor, (name, None))
                if constant is None or not torch.equal(constant, value):
                    raise self._not_finite(name if infinite else first, tensor)
        seen.add(name)

    def strangers(self, names: Iterable[str]) -> list[str]:
        """Tell which of these checkpoints point elsewhere than the others, from what was read.

        Parameters
        ----------
        names : iterable of str
            Checkpoints to compare; those that were not read are left out.

        Returns
        -------
        strangers : list of str
            Those whose cosine to the mean of the others, on a few numbers of each matrix, is below
            0.5. `describe` compares all numbers.
        """
        read = {name: self._samples[name] for name in names if name in self._samples}
        shared = [t for t in self.layout if read and all(t in s for s in read.values())]
        return strangers_among({name: [s[t] for t in shared] for name, s in read.items()})

    def describe(self) -> CollectionSummary:
        """Compare the checkpoints: distances, directions, duplicates, frozen parts, a verdict.

        Returns
        -------
        summary : CollectionSummary
            Print it, or use ``to_dict()``.

        Raises
        ------
        CheckpointError
            As `open`.

        Notes
        -----
        Two reads of all files; memory of two models in float64 and one tensor.

        Examples
        --------
        >>> import torch
        >>> from sksoup import CheckpointCollection
        >>> start = torch.nn.Linear(20, 20).state_dict()
        >>> tuned = [{k: v + 0.01 * i for k, v in start.items()} for i in range(3)]
        >>> print(CheckpointCollection(tuned).describe().verdict[0])
        These ingredients lie close together, as fine-tunings of one start do: good to mix.
        """
        return describe(self)

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
        return self._with({name: self._entries[name] for name in chosen})

    def _named_as(self, tensors: Iterable[str]) -> Self:
        """The same, with the prefixes dropped that make the names of the tensors these."""
        wanted = set(tensors)
        if self.layout.keys() == wanted:
            return self
        entries = {name: copy.copy(entry) for name, entry in self._entries.items()}
        for entry in entries.values():
            entry.strip("")
        fit_names(list(entries.values()), wanted)
        return self._with(entries)

    def _aliased(self, names: Mapping[str, str]) -> Self:
        """Some of the checkpoints by other names, one perhaps by several."""
        part = copy.copy(self)
        part.scores, part._hashes, part._hashing = None, {}, {}
        return part._with({new: self._entries[old] for new, old in names.items()})

    def _key(self, name: str) -> str | None:
        """Which state dict of its container a checkpoint is, where that was said."""
        return getattr(self._entries[name], "key", None)

    def _with(self, entries: dict[str, Checkpoint]) -> Self:
        """Some of the checkpoints, or the same under other names of their tensors."""
        part, chosen = copy.copy(self), tuple(entries)
        part.names = chosen
        part._entries = entries
        part.layout = _common_layout(part._entries)
        part.scores = None if self.scores is None else {n: self.scores[n] for n in chosen}
        part._finite = {tensor: set() for tensor in part.layout}
        part._infinite = {}
        part._samples = {}
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
        ValueError
            A name leads out of the folder.
        """
        root = Path(folder)
        paths = {name: root / f"{name}.safetensors" for name in self.names}
        for path in paths.values():
            if root.resolve() not in path.resolve().parents:
                raise ValueError(f"{str(path)!r} would be outside {str(root)!r}: change its name.")
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

    def identity(self, name: str) -> tuple[Any, ...]:
        """Return what tells a checkpoint from one that took its place.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        identity : tuple
            Sizes, modification times and inodes of its files; the SHA-256 of one in memory.
        """
        entry = self._entries[name]
        return entry.identity() if isinstance(entry, FileCheckpoint) else (self.sha256(name),)

    def start_hashing(self) -> None:
        """Begin to hash the files in one background thread, while the search reads them."""
        missing = [n for n in self.names if n not in self._hashes and n not in self._hashing]
        if missing:
            executor = ThreadPoolExecutor(1, thread_name_prefix="sksoup-sha256")
            self._hashing.update({n: executor.submit(self._entries[n].sha256) for n in missing})
            executor.shutdown(wait=False)

    def stop_hashing(self) -> None:
        """Hash no more files than the one that is being read; `sha256` does when asked."""
        for name, pending in list(self._hashing.items()):
            if pending.cancel():
                self._hashing.pop(name, None)

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
            with suppress(CancelledError):
                self._hashes[name] = pending.result() if pending else self._entries[name].sha256()
        if name not in self._hashes:
            self._hashes[name] = self._entries[name].sha256()
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
        return content_sha256(self._entries[name])

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Walk the tensors that live in this collection itself, in no file.

        Yields
        ------
        tensor : Tensor
            Not a copy: never write to it.
        """
        for entry in self._entries.values():
            if isinstance(entry, MemoryCheckpoint):
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
        return entry.path if isinstance(entry, FileCheckpoint) else None


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


def _common_layout(entries: Mapping[str, Checkpoint]) -> dict[str, TensorInfo]:
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
            if info == expected:
                continue
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
            try:
                promoted = torch.promote_types(info.dtype, expected.dtype)
            except RuntimeError as error:  # float8 and unsigned integers promote to nothing
                raise CheckpointError(
                    f"{entry!r} cannot join this collection: {tensor!r} has dtype {info.dtype}, "
                    f"which torch can't mix with {expected.dtype} as in {first!r}. Convert one of "
                    f"them, or leave {name!r} out."
                ) from error
            layout[tensor] = TensorInfo(info.shape, promoted)
    return layout


def _check_same_keys(name: str, entry: Checkpoint, first: Checkpoint) -> None:
    if entry.header.keys() == first.header.keys():
        return
    lacking = [tensor for tensor in first.header if tensor not in entry.header]
    extra = [tensor for tensor in entry.header if tensor not in first.header]
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
