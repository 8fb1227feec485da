"""The collection: named checkpoints of one architecture, opened lazily, never changed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
from torch import nn

from ..exceptions import CheckpointError, SoupWarning
from ..runtime.copies import copied, of_its_own
from ..runtime.distributed import agreed
from ..runtime.random_state import preserved_random_state
from ..runtime.shards import sharded_parts
from ..tables import Table, notebook_html
from .agreement import check_names, check_scores, common_layout, named
from .architecture import ModuleSource
from .converted import ConvertedCheckpoint, convert_names, unconverted
from .describe import CollectionSummary, describe
from .health import Health
from .hub_agreement import check_configs
from .in_memory import content_sha256
from .low_rank import Factors, LowRankCheckpoint, ReadFactors
from .on_base import refuse_factors, resolve_adapters
from .prefixes import drop_prefixes, fit_names, take_prefix
from .protocol import STOP, Entry, Read, TensorInfo
from .records import recorded_scores
from .relations import Relations
from .slices import SlicedCheckpoint
from .sources import default_names, find_checkpoints, open_source
from .survey import reasons, survey, usable
from .sweeps import Which
from .tied import drop_copies
from .write import write_safetensors

__all__ = ["CheckpointCollection"]


class CheckpointCollection(Mapping[str, dict[str, torch.Tensor]]):
    """Named checkpoints of one architecture, whose weights are loaded only when needed.

    An immutable mapping from names to state dicts. Opening a collection reads only headers. The
    weights of a file are read when a recipe, `mix` or ``collection[name]`` needs them, and freed
    afterwards.

    Parameters
    ----------
    checkpoints : iterable or mapping
        Paths of files (``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.pth.tar``, an
        ``.index.json`` of shards) or of Hugging Face, PEFT (LoRA) and skorch ``Checkpoint``
        folders; modules, fitted skorch nets, PeftModels, or state dicts, which are copied to the
        CPU; objects that implement the protocol ``sksoup.checkpoints.protocol.Checkpoint``; or
        another collection, for example to add a module or scores without reading it again. A
        mapping sets the names.
    module : callable, nn.Module, skorch net, path or None, default=None
        The architecture: a function or class without required arguments that returns a module, a
        module (copied before use), a skorch net or the path of a Hugging Face folder. By default it
        is taken from the first module or net among the checkpoints, or from the ``config.json`` of
        the first Hugging Face folder (extra ``hub``). Needed for predictions, but not for `mix` and
        `Recipe.cook`. LoRA adapters need their base model with its weights, as it was before PEFT
        wrapped it. By default this is the folder that they name, or its copy in the local Hugging
        Face cache.
    names : sequence of str or None, default=None
        Unique names. By default file names without suffix (preceded by folder names if needed to
        make them unique), or ``checkpoint0``, ``checkpoint1``, ... for checkpoints in memory.
    scores : mapping of str to float or None, default=None
        Known held-out scores by name; greater is better. With scores, `GreedySoup` and
        `BestCheckpoint` do not have to evaluate the checkpoints to rank them.
    key : str or None, default=None
        Which state dict to use from training checkpoints that contain several, such as ``"ema"``.
    prefix : str or None, default=None
        Use only the tensors whose names start with this prefix, and remove it from the names. For
        example, ``"model."`` for Lightning files that also contain tensors of a loss or a metric.
        By default the prefixes ``module.``, ``_orig_mod.`` and ``model.`` are removed if all names
        then match the module, or each other. If the module is from transformers, tensors are
        renamed as in ``from_pretrained``.

    Attributes
    ----------
    names : tuple of str
        Names, in the order of the last axis of ``coef_``.
    layout : dict of str to TensorInfo
        Shape and dtype of every tensor. If the dtypes of the checkpoints differ, it is the promoted
        dtype.
    nbytes : int
        Size of the weights of one model in bytes.
    scores : dict of str to float or None
        The known scores, as passed.

    Raises
    ------
    CheckpointError
        There are no checkpoints; a file is missing, empty or damaged, or contains objects other
        than tensors; checkpoints differ in keys, shapes or kind of dtype (floating or integer);
        or Hugging Face folders differ in the order of their labels or in the number of attention
        heads. While reading: weights are NaN or infinite, or a file changed since the collection
        was opened.

    Warns
    -----
    SoupWarning
        The ``config.json`` of Hugging Face folders differ in other settings of the network.

    Notes
    -----
    Files are never unpickled unsafely, and there is no option for it. Harmless classes that a
    training checkpoint contains in addition to the weights are replaced by inert placeholders. A
    pickled collection contains the paths of files (not their contents) and the tensors of in-memory
    checkpoints. Two collections are equal only if they are the same object, and
    ``sklearn.base.clone`` returns the same object. Infinite values are accepted only if they are
    the same in every checkpoint, as in an attention mask; NaN is never accepted. If only some
    checkpoints store tied weights by all of their names, the further names are left out; their
    values are read to check that they are equal.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection
    >>> nets = [torch.nn.Linear(2, 3) for _ in range(4)]
    >>> CheckpointCollection(nets, module=lambda: torch.nn.Linear(2, 3))
    CheckpointCollection(4 checkpoints, 2 tensors, 36 bytes each, in memory)
    """

    module: ModuleSource | None
    scores: dict[str, float] | None
    rows: Mapping[str, slice] = MappingProxyType({})  # of the tensors that are read in part

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
        given, names = named(checkpoints, names)
        given, self.module = resolve_adapters(given, module, key)
        opened = [open_source(item, index, key) for index, item in enumerate(given)]
        entries = [replace(entry, without=frozenset()) for entry in opened]  # is found again
        for entry in entries:
            refuse_factors(entry)
        if prefix is None:
            entries = drop_prefixes(entries, self.module)
        else:
            entries = take_prefix(entries, prefix)
        entries = drop_copies(convert_names(entries, self.module), self.module)
        check_configs(entries)
        self.names: tuple[str, ...] = tuple(names) if names is not None else default_names(entries)
        check_names(self.names, len(entries))
        self._entries: dict[str, Entry] = dict(zip(self.names, entries, strict=True))
        self.layout: dict[str, TensorInfo] = common_layout(self._entries)
        self.scores = check_scores(scores, self.names)
        self.health = Health(len(entries) * len(self.layout))
        self.whole: CheckpointCollection = self  # what `slice_rows` was called on
        self._opened_with = key, prefix
        self._taken = ""  # which checkpoints of the runs were taken, in words

    @classmethod
    def from_path(
        cls,
        path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        which: Which | None = None,
        module: ModuleSource | None = None,
        scores: Mapping[str, float] | Literal["recorded"] | None = None,
        key: str | None = None,
        prefix: str | None = None,
    ) -> Self:
        """Open the checkpoints in a folder, a sweep or a glob pattern, in natural order.

        Parameters
        ----------
        path : str, path-like, or an iterable of them
            A folder (all checkpoints in it: files, sharded checkpoints, Hugging Face and skorch
            folders), a sweep (a folder of runs, up to two levels deep, as written by transformers'
            Trainer or Lightning), a glob pattern (``"runs/**/*.safetensors"``,
            ``"runs/checkpoint-*"``), or a single file or Hugging Face folder. ``~`` is expanded to
            the home folder.
        which : {"best", "last", "all"} or None, default=None
            Which checkpoints to take from each training run: a folder with ``checkpoint-N``
            folders, ``.ckpt`` files, or files named after an epoch, a step, ``best`` or ``last``.
            "best" is the checkpoint marked as best in ``trainer_state.json``, by Lightning's
            ModelCheckpoint or in the file name, otherwise the last one. By default the best one of
            each run in a sweep, and all of them if the path is a single run. The repr says what was
            taken, and the logger ``sksoup`` lists the names at level INFO.
        module, key, prefix
            As in the constructor.
        scores : mapping of str to float, "recorded" or None, default=None
            As in the constructor. "recorded" uses the scores that training wrote to
            ``trainer_state.json`` or to the ``.ckpt`` files, negated if smaller is better.

        Returns
        -------
        collection : CheckpointCollection
            Ordered so that ``ft2`` comes before ``ft10``. In a sweep, the names are those of the
            run folders.

        Raises
        ------
        CheckpointError
            No checkpoint was found; a folder is a checkpoint and contains further ones; files of
            one run are of the same step and differ (with "best" or "last"); recorded
            scores are missing, are of different metrics, or do not say whether greater is better;
            or as in the constructor.

        Notes
        -----
        The final model that Trainer saves in the run folder counts as the last checkpoint, unless
        the best one is known. With "all" it is left out, because it is a copy of one of the others.
        Copies, such as Lightning's ``last.ckpt``, are left out: ``.ckpt`` files of the same step
        and with the same weights, which are read to find out. Files of one step that differ are of
        several runs; "all" takes them all, "best" and "last" refuse them.

        Examples
        --------
        >>> CheckpointCollection.from_path("no/such/folder/*.pt")
        Traceback (most recent call last):
        ...
        sksoup.exceptions.CheckpointError: No checkpoints found at 'no/such/folder/*.pt': ...
        """
        if isinstance(scores, str) and scores != "recorded":
            raise ValueError(f"scores={scores!r} is unknown: expected a mapping or 'recorded'.")
        found = find_checkpoints(path, which)
        known = None if isinstance(scores, str) else scores
        collection = cls(
            found.paths, module=module, names=found.names, scores=known, key=key, prefix=prefix
        )
        if isinstance(scores, str):
            taken = [(p, run.record) for p, run in zip(found.paths, found.runs, strict=True)]
            numbers = dict(zip(collection.names, recorded_scores(taken), strict=True))
            collection.scores = check_scores(numbers, collection.names)
        collection._taken = found.taken
        return collection

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "health": Health(len(self) * len(self.layout))}

    def __repr__(self) -> str:
        files = sum(self.path(name) is not None for name in self)
        taken = f": {self._taken}" if self._taken else ""
        where = {len(self): "on disk", 0: "in memory"}.get(files, f"{files} on disk")
        return (
            f"CheckpointCollection({len(self)} checkpoint{'s' * (len(self) > 1)}, "
            f"{len(self.layout)} tensors, {self.nbytes:,} bytes each, {where}{taken})"
        )

    def _repr_html_(self) -> str:
        """The names, files and scores that are known; nothing is read."""
        scores, rows = self.scores or {}, []
        for name in self.names:
            path = self.path(name)
            file = "" if path is None else path.name
            rows.append((name, file, f"{scores[name]:.4f}" if name in scores else ""))
        table = Table(("name", "file", "score"), rows, left=(0, 1)).without_empty()
        return notebook_html(repr(self), table)

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
            Returns a tensor on the CPU in its stored dtype. It may be a view of the file: do not
            write to it, and copy it if you need it after the context ends.

        Raises
        ------
        CheckpointError
            The file changed or can't be read, or a tensor contains NaN or Inf.
        """
        entry = self._entries[name]
        with entry.checkpoint.open() as read_unchecked:

            def read(tensor: str) -> torch.Tensor:
                value = read_unchecked(entry.prefix + tensor)
                if (bad := self.health.see(name, tensor, value)) is not None:
                    raise self._not_finite(bad, tensor)
                return value

            yield read

    def check(self) -> None:
        """Read every tensor that has not been read yet, and raise an error if one is not finite.

        Raises
        ------
        CheckpointError
            As for `open`. The message names the file and the tensor.
        """
        based: dict[int, str] = {}  # bases that were read, and the checkpoint read with each
        for name in self.names:
            unread = self.health.unread(name, self.layout)
            found = self._entries[name].checkpoint
            if isinstance(found, LowRankCheckpoint):
                first = based.setdefault(id(found.base), name)
                unread = [t for t in unread if not self._shares(name, first, t)]
            if unread:
                with agreed(bool(self.rows)), self.open(name) as read:
                    for tensor in unread:
                        read(tensor)

    def _shares(self, name: str, other: str, tensor: str) -> bool:
        """Whether two adapters share a tensor of the base, which was checked in the other one."""
        for entry in (self._entries[name], self._entries[other]):
            found = entry.checkpoint
            if not isinstance(found, LowRankCheckpoint) or found.adds(entry.prefix + tensor):
                return False
        if name == other:
            return False
        return self.health.share(name, other, tensor)

    def on_one_base(self, names: Sequence[str] | None = None) -> dict[str, LowRankCheckpoint]:
        """Return checkpoints by name if all of them are low-rank adapters of one base.

        Parameters
        ----------
        names : sequence of str or None, default=None
            Names of checkpoints. By default all of them.

        Returns
        -------
        adapters : dict of str to LowRankCheckpoint
            Empty if one is not an adapter, if they have different bases, or if a prefix was removed
            from their names.
        """
        chosen = self.names if names is None else names
        adapters = self.adapters(chosen)
        bases = {id(one.base): one.base for one in adapters.values()}.values()
        is_one = len(bases) == 1 or len({repr(base.identity()) for base in bases}) == 1
        is_plain = not any(self._entries[name].prefix for name in chosen)
        return adapters if is_one and is_plain and len(adapters) == len(chosen) else {}

    def adapters(self, names: Iterable[str]) -> dict[str, LowRankCheckpoint]:
        """Return those of these checkpoints that are low-rank adapters.

        Parameters
        ----------
        names : iterable of str
            Names of checkpoints.

        Returns
        -------
        adapters : dict of str to LowRankCheckpoint
            Adapters by name, in order.
        """
        found = {name: self._entries[name].checkpoint for name in names}
        return {name: one for name, one in found.items() if isinstance(one, LowRankCheckpoint)}

    @contextmanager
    def open_factors(self, name: str) -> Iterator[tuple[ReadFactors, Read]]:
        """Open the factors of an adapter, and the tensors that it replaces in its base.

        Parameters
        ----------
        name : str
            Name of a checkpoint that `on_one_base` returns.

        Yields
        ------
        factors : callable, tensor name -> Factors or None
            Returns None if the tensor is that of the base or is stored as a whole.
        read : callable, tensor name -> tensor
            As in `open`, for tensors that are stored as a whole.

        Raises
        ------
        CheckpointError
                        As for `open`.
        """
        with self.adapters([name])[name].open_factors() as (factors, read_unchecked):

            def read_factors(tensor: str) -> Factors | None:
                both = factors(tensor)
                if both is not None and not both.is_finite():
                    raise self._not_finite(name, tensor)
                return both

            def read(tensor: str) -> torch.Tensor:
                value = read_unchecked(tensor)
                if (bad := self.health.see(name, tensor, value)) is not None:
                    raise self._not_finite(bad, tensor)
                return value

            yield read_factors, read

    def _not_finite(self, name: str, tensor: str) -> CheckpointError:
        return CheckpointError(
            f"{self._entries[name]!r} can't be used: {tensor!r} holds NaN or infinite values. Its "
            f"training run has probably diverged. Leave it out with collection.drop({name!r}), or "
            f"leave out all such checkpoints with collection.healthy()."
        )

    def describe(self) -> CollectionSummary:
        """Compare the checkpoints: distances, directions, duplicates, frozen parts and a verdict.

        Returns
        -------
        summary : CollectionSummary
            Summary that can be printed, or converted with ``to_dict()``.

        Notes
        -----
        All files are read once. Memory: one tensor, and at most 256 numbers for each tensor of
        every checkpoint (fewer, at least 16, if they are more than 65,536). Checkpoints are
        compared in pairs and with their median, so related checkpoints are recognized as long as
        they are the majority, however bad the others are. A checkpoint is unrelated if its median
        cosine to the others is below 0.5, or if its distance from the median is more than 10 times
        the usual one (the factor is larger for a wide sweep with very different distances). A
        checkpoint that can't be read or contains NaN is listed with its ``problem``.

        Examples
        --------
        >>> import torch
        >>> from sksoup import CheckpointCollection
        >>> start = torch.nn.Linear(20, 20).state_dict()
        >>> tuned = [{k: v + 0.01 * i for k, v in start.items()} for i in range(3)]
        >>> print(CheckpointCollection(tuned).describe().verdict[0])
        The checkpoints are close together, as expected after fine-tuning: good to mix.
        """
        return describe(self)

    def healthy(self) -> CheckpointCollection:
        """Return the collection without the checkpoints that would ruin a soup.

        Checkpoints are left out, with a warning that states the reason, if they can't be read,
        contain NaN or infinite values, or are unrelated to the others according to `describe`, such
        as those of a diverged run.

        Returns
        -------
        collection : CheckpointCollection
            The other checkpoints, in order, with their scores; the same object if none is left out.

        Raises
        ------
        CheckpointError
            No checkpoint would be left.

        Warns
        -----
        SoupWarning
            Lists the checkpoints that were left out.

        See Also
        --------
        drop : Leave out checkpoints by name.

        Notes
        -----
        All files are read once; no file is changed. Infinite values that most checkpoints share, as
        in an attention mask, are allowed.

        Examples
        --------
        >>> import warnings
        >>> import torch
        >>> from sksoup import CheckpointCollection
        >>> start = torch.nn.Linear(20, 20).state_dict()
        >>> runs = [{k: v + 0.01 * i for k, v in start.items()} for i in range(4)]
        >>> runs[2]["weight"][0, 0] = float("nan")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     print(CheckpointCollection(runs).healthy().names)
        ('checkpoint0', 'checkpoint1', 'checkpoint3')
        >>> print(caught[0].message)
        Left out 1 of 4 checkpoints: 'checkpoint2' ('weight' holds NaN).
        """
        found = survey(self)
        names = usable(self, found)
        unrelated = found.relations(names, self.layout, least=1).unrelated
        bad = {n: found.problems.get(n) or unrelated.get(n) for n in self.names}
        why = {name: reason for name, reason in bad.items() if reason}
        if not why:
            return self
        said = reasons(why)
        if len(why) == len(self):
            raise CheckpointError(
                f"No checkpoint of this collection is healthy: {said}. Most of them must be "
                f"readable, finite and fine-tuned from the same weights. Check how they were made."
            )
        warnings.warn(
            f"Left out {len(why)} of {len(self)} checkpoints: {said}.", SoupWarning, stacklevel=2
        )
        return self.drop(why)

    def soups(self) -> list[str]:
        """Return the names of the checkpoints that are soups which sksoup wrote.

        Returns
        -------
        soups : list of str
            Names of the files and folders that contain a recipe, or have one beside them.
        """
        return [name for name, entry in self._entries.items() if entry.is_soup]

    def relations(self, names: Iterable[str]) -> Relations:
        """Compare those of these checkpoints that were read, by a sample of each matrix.

        Parameters
        ----------
        names : iterable of str
            Checkpoints to compare.

        Returns
        -------
        relations : Relations
            ``relations.unrelated`` maps the names of unrelated checkpoints to the measurement. The
            criterion is that of `describe`, but nothing is read. Networks with fewer than 64
            numbers that differ are not compared, nor are adapters of one base if only their factors
            were read.
        """
        adapters = self.on_one_base().values()
        changed = {tensor for one in adapters for tensor in one.ranks}
        # newly initialized heads do not show whether the rest is related
        read = [name for name in names if not self.health.unread(name, changed)]
        return self.health.relations(read, self.layout)

    def strangers(self, names: Iterable[str]) -> list[str]:
        """Return the names of those of these checkpoints that are unrelated to the others.

        Parameters
        ----------
        names : iterable of str
            Checkpoints to compare. Those that have not been read yet are ignored.

        Returns
        -------
        strangers : list of str
            The keys of ``relations(names).unrelated``.
        """
        return list(self.relations(names).unrelated)

    def judged_by(self, health: Health) -> Self:
        """Return the same collection with another health check.

        Parameters
        ----------
        health : Health
            Checks every tensor that is read.

        Returns
        -------
        collection : CheckpointCollection
            Shares files and tensors with this collection.
        """
        part = copy.copy(self)
        part.health = health
        return part

    def select(self, names: Iterable[str]) -> CheckpointCollection:
        """Return a collection of these checkpoints only, in the order of ``names``.

        Parameters
        ----------
        names : iterable of str
            Names of checkpoints.

        Returns
        -------
        collection : CheckpointCollection
            Shares files and tensors with this one; nothing is read. The same object if these are
            all of its checkpoints, in their order.

        Raises
        ------
        KeyError
            A name is not in the collection.
        """
        chosen = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in chosen if name not in self]
        if unknown:
            raise KeyError(
                f"No checkpoint named {', '.join(map(repr, unknown[:5]))} in this collection of "
                f"{len(self)}: it holds {', '.join(map(repr, self.names[:5]))}"
                f"{', ...' if len(self) > 5 else ''}."
            )
        check_names(chosen, len(chosen))
        return self._with({name: self._entries[name] for name in chosen})

    def drop(self, names: str | Iterable[str]) -> CheckpointCollection:
        """Return a collection without these checkpoints.

        Parameters
        ----------
        names : str or iterable of str
            Names of the checkpoints to leave out.

        Returns
        -------
        collection : CheckpointCollection
            The other checkpoints, in order.

        Raises
        ------
        KeyError
            A name is not in the collection.
        """
        dropped = self.select(names)
        return self.select(name for name in self if name not in dropped)

    def add(self, name: str, checkpoint: Any) -> CheckpointCollection:
        """Return a collection with one more checkpoint, such as the pretrained weights.

        Parameters
        ----------
        name : str
            Name of the new checkpoint.
        checkpoint : str, path-like, mapping of str to Tensor, or nn.Module
            Anything that the constructor accepts as a checkpoint. If it does not match this
            collection, it is opened with the same ``key`` and ``prefix``.

        Returns
        -------
        collection : CheckpointCollection
            The checkpoints of this collection followed by the new one. It has no ``scores``,
            because the score of the new one is unknown.

        Raises
        ------
        ValueError
            The name is already taken.
        CheckpointError
            The checkpoint can't be opened, or its tensors differ from those of the collection.
        """
        if name in self:
            raise ValueError(f"{name!r} is already in this collection. Choose another name.")
        key, prefix = self._opened_with
        try:
            both = CheckpointCollection({**self._entries, name: checkpoint}, module=self.module)
        except CheckpointError as error:
            if key is None and prefix is None:
                raise
            try:  # as the others were opened
                alone = CheckpointCollection(
                    {name: checkpoint}, module=self.module, key=key, prefix=prefix
                )
                both = CheckpointCollection({**self._entries, **alone._entries}, module=self.module)
            except CheckpointError:
                raise error from None
        return self._with(both._entries)

    def _renamed(self, names: Mapping[str, str], tensors: Iterable[str]) -> Self:
        """Checkpoints by new names; prefixes that do not belong to the tensor names are removed."""
        entries = [self._entries[old] for old in names.values()]
        if self.layout.keys() != set(tensors):
            whole = [replace(unconverted(entry), without=frozenset()) for entry in entries]
            entries = fit_names(whole, set(tensors))
            entries = drop_copies(entries, self.module, set(tensors))
        return self._with(dict(zip(names, entries, strict=True)))

    def _with(self, entries: dict[str, Entry]) -> Self:
        """The same collection with these checkpoints, and with their scores."""
        if tuple(entries) == self.names and all(self._entries[n] is entries[n] for n in entries):
            return self  # with what was found while it was read
        part = copy.copy(self)
        part.names, part._entries, part._taken = tuple(entries), entries, ""
        part.layout = common_layout(entries)
        if self.scores is not None:
            known = {name: score for name, score in self.scores.items() if name in entries}
            part.scores = known if len(known) == len(entries) else None
        part.health = Health(len(entries) * len(part.layout))
        part.whole = part
        return part

    def slice_rows(self, rows: Mapping[str, slice]) -> CheckpointCollection:
        """Return the same checkpoints, restricted to slices along dimension 0 of their tensors.

        Parameters
        ----------
        rows : mapping of str to slice
            Slices by tensor name. Tensors that are not listed are read as a whole.

        Returns
        -------
        collection : CheckpointCollection
            Shares files and tensors with this collection; nothing is read yet. From a
            ``.safetensors`` file only the slices are read; a file written by ``torch.save`` is
            memory-mapped; tensors of anything else (adapters, converted or legacy files) are read
            as a whole and sliced.
        """
        entries = {
            name: Entry(SlicedCheckpoint(entry, rows)) for name, entry in self._entries.items()
        }
        part = self._with(entries)
        part.rows, part.whole = dict(rows), self
        return part

    def save(self, folder: str | os.PathLike[str]) -> CheckpointCollection:
        """Write every checkpoint to ``folder`` as ``<name>.safetensors`` and open those files.

        Parameters
        ----------
        folder : str or path-like
            Created if it does not exist.

        Returns
        -------
        collection : CheckpointCollection
            A collection of files, which holds no weights in memory and pickles to a small size.

        Raises
        ------
        FileExistsError
            A file with one of the names already exists; nothing is written.
        ValueError
            A name points outside the folder.
        """
        root = Path(folder)
        paths = {name: root / f"{name}.safetensors" for name in self.names}
        if len({path.resolve() for path in paths.values()}) < len(paths):
            raise ValueError(
                f"Two checkpoints would be written to the same file in {str(root)!r}, such as 'a' "
                f"and 'b/../a'. Choose other names with names=."
            )
        for path in paths.values():
            if root.resolve() not in path.resolve().parents:
                raise ValueError(
                    f"{str(path)!r} would be outside {str(root)!r}. Choose another "
                    f"name for the checkpoint."
                )
            if os.path.lexists(path):
                raise FileExistsError(
                    f"{str(path)!r} already exists. Save the collection to another folder, or move "
                    f"the file away."
                )
        for name, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, self[name])
        return CheckpointCollection(paths, module=self.module, scores=self.scores)

    def build_module(self) -> nn.Module:
        """Build a new module of the architecture, without changing the global random state.

        Returns
        -------
        module : nn.Module
            A module on the CPU, with the weights that the factory initializes; a copy if the
            factory keeps what it returns (``lambda: network``), as its variables or an earlier
            call show. A module that was wrapped with ``fully_shard`` is not copied and stays on
            its device.

        Raises
        ------
        CheckpointError
                        The collection has no ``module``.
        TypeError
            The factory does not return an ``nn.Module``.
        """
        if self.module is None:
            raise CheckpointError(
                "This collection has no module, so it can average weights but not predict. Pass "
                "the architecture: CheckpointCollection(..., module=build_model)."
            )
        if isinstance(self.module, nn.Module):
            if sharded_parts(self.module):  # can't be copied, so it becomes the soup
                return self.module
            return copied(self.module).cpu()
        with preserved_random_state():
            module = self.module()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module={self.module!r} returned a {type(module).__name__}, expected an nn.Module."
            )
        if sharded_parts(module) or any(p.is_meta for p in module.parameters()):
            return module
        return of_its_own(module, self.module).cpu()

    def path(self, name: str) -> Path | None:
        """Return the file of a checkpoint, or None if it is in memory.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        path : Path or None
            Absolute path.
        """
        return self._entries[name].checkpoint.path

    def dtypes(
        self, names: Iterable[str], tensors: Iterable[str] | None = None
    ) -> dict[str, torch.dtype]:
        """Return the dtypes of tensors, or of all, in a mix of these checkpoints: promoted ones."""
        headers = [self._entries[name].header for name in names]
        return {
            tensor: reduce(torch.promote_types, (header[tensor].dtype for header in headers))
            for tensor in (self.layout if tensors is None else tensors)
        }

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Iterate over the tensors that this collection holds in memory.

        Yields
        ------
        tensor : Tensor
            Not a copy: do not write to it.
        """
        for entry in self._entries.values():
            yield from entry.checkpoint.held_tensors()

    def warm(self, name: str) -> None:
        """Ask the operating system to read a checkpoint's file into its cache in the background.

        Parameters
        ----------
        name : str
            Name of the checkpoint. Nothing happens if it is in memory.
        """
        self._entries[name].checkpoint.warm()

    def identity(self, name: str) -> tuple[Any, ...]:
        """Return an identity that changes if the checkpoint is replaced.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        identity : tuple
            Sizes, times and inodes of its files, or the SHA-256 if it is in memory.
        """
        entry = self._entries[name]
        if isinstance(entry.checkpoint, SlicedCheckpoint):  # that of the whole checkpoint
            return entry.checkpoint.identity()
        return (entry.prefix, *sorted(entry.without), *entry.checkpoint.identity())

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a checkpoint's file, or of its names and values if it is in memory.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        digest : str
            64 hexadecimal digits. Computed only once.
        """
        entry = self._entries[name]
        if entry.without and entry.checkpoint.path is None:
            return self.content_sha256(name)
        return entry.checkpoint.sha256(entry.prefix)

    def content_sha256(self, name: str) -> str:
        """Return the SHA-256 of a checkpoint's names, dtypes, shapes and values.

        Parameters
        ----------
        name : str
            Name of the checkpoint.

        Returns
        -------
        digest : str
            64 hexadecimal digits; the same in memory and in a file of any format. For a LoRA
            adapter it covers its own tensors and their scales, without the base. Computed only
            once.
        """
        entry = self._entries[name]
        if not entry.digests:
            if isinstance(entry.checkpoint, LowRankCheckpoint):
                entry.digests.append(entry.checkpoint.content_sha256())
            else:
                entry.digests.append(content_sha256(entry))
        return entry.digests[0]

    def _part(self, name: str) -> tuple[str | None, str | None]:
        """Which part of its file a checkpoint is: ``key`` and ``prefix``, if they were passed."""
        entry = self._entries[name]
        if isinstance(entry.checkpoint, ConvertedCheckpoint):
            entry = entry.checkpoint.entry
        return entry.checkpoint.key, entry.prefix if entry.is_given else None

    @contextmanager
    def hashing(self) -> Iterator[None]:
        """Compute `sha256` of the checkpoints in a background thread, until the context ends."""
        stop = threading.Event()

        def run() -> None:
            STOP.set(stop)
            for name in self.names:
                with suppress(Exception):  # raised again when the digest is requested
                    if not stop.is_set():
                        self.sha256(name)

        thread = threading.Thread(target=run, name="sksoup-sha256")
        thread.start()
        try:
            yield
        finally:  # Python can't end, and a forked process can't hash, while such a thread runs
            stop.set()
            thread.join()

    def __sklearn_clone__(self) -> CheckpointCollection:
        if multiprocessing.parent_process() is None:  # not in the main process
            self.n_threads_of_parent = torch.get_num_threads()
        return self

    @contextmanager
    def threads_of_parent(self) -> Iterator[None]:
        """In a worker, use as many threads as the process that sent this collection.

        joblib gives its workers fewer threads, which would change the last bits of sums. (Soups are
        cloned when they are sent, collections are not.)
        """
        n, wanted = torch.get_num_threads(), getattr(self, "n_threads_of_parent", None)
        if wanted is None or multiprocessing.parent_process() is None:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(n)
