"""The collection: named checkpoints of one architecture, opened lazily, never changed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
from torch import nn

from ..exceptions import CheckpointError, SoupWarning
from ..runtime.distributed import agreed
from ..runtime.random_state import preserved_random_state
from ..runtime.shards import sharded_parts
from ..tables import Table, notebook_html
from .agreement import check_names, check_scores, common_layout, named
from .architecture import ModuleSource
from .converted import convert_names, unconverted
from .describe import CollectionSummary, describe
from .health import Health
from .in_memory import content_sha256
from .low_rank import Factors, LowRankCheckpoint, ReadFactors
from .on_base import refuse_factors, resolve_adapters
from .prefixes import drop_prefixes, fit_names, take_prefix
from .protocol import Entry, Read, TensorInfo
from .records import recorded_scores
from .relations import Relations
from .slices import SlicedCheckpoint
from .sources import default_names, find_checkpoints, open_source
from .survey import reasons, survey, usable
from .sweeps import Which
from .write import write_safetensors

__all__ = ["CheckpointCollection"]


class CheckpointCollection(Mapping[str, dict[str, torch.Tensor]]):
    """Hold named checkpoints of one architecture and load their weights only when asked.

    An immutable mapping from name to state dict. Opening it reads headers; the weights of a file
    are read when a recipe, `mix` or ``collection[name]`` needs them, and let go afterwards.

    Parameters
    ----------
    checkpoints : iterable or mapping
        Paths of files (``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, an
        ``.index.json`` of shards) or of Hugging Face, PEFT (LoRA) and skorch ``Checkpoint``
        folders; modules, fitted skorch nets, PeftModels, or state dicts, which are copied to the
        CPU; objects that satisfy the protocol ``sksoup.checkpoints.protocol.Checkpoint``; or a
        collection, opened again without a read, to give it a module or scores. A mapping gives
        them names.
    module : callable, nn.Module, skorch net, path or None, default=None
        The architecture: a factory without arguments, a module (copied before use), a skorch net
        or the path of a Hugging Face folder. By default that of the first module or net given, or
        of the ``config.json`` of the first Hugging Face folder (extra ``hub``). Needed by
        everything that predicts; `mix` and `Recipe.cook` do without. LoRA adapters need their
        base, weights included: the network as it was before PEFT wrapped it; by default the folder
        that they name, or its copy in the Hugging Face cache, if it is on this machine.
    names : sequence of str or None, default=None
        Unique names; by default file stems (with as much of the folder as makes them unique), or
        ``checkpoint0``, ``checkpoint1``, ...
    scores : mapping of str to float or None, default=None
        Known held-out scores by name, greater is better. With them `GreedySoup` and
        `BestCheckpoint` need not rank.
    key : str or None, default=None
        Which state dict to take out of training containers that hold several, such as ``"ema"``.
    prefix : str or None, default=None
        Take only the tensors whose names begin with this, such as ``"model."`` of a Lightning file
        that holds a loss's or a metric's tensors beside the network's, and leave it out of their
        names. By default ``module.``, ``_orig_mod.`` and ``model.`` are dropped where that makes
        all names fit the module, or each other. Where the module is one of transformers, tensors
        have its names, as after ``from_pretrained``.

    Attributes
    ----------
    names : tuple of str
        Names in order; the order of the last axis of ``coef_``.
    layout : dict of str to TensorInfo
        Shape and dtype of every tensor, the promoted dtype where checkpoints differ.
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
    holds beside its weights become inert placeholders. A pickle of a collection holds the paths of
    files (not their contents) and the tensors of in-memory checkpoints. Two collections are equal
    only if they are the same object, and ``sklearn.base.clone`` returns the same object. An
    infinite value is accepted only where it is the same in every checkpoint, as in a buffer that
    masks attention; NaN never is.

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
    rows: Mapping[str, slice] = MappingProxyType({})  # those of tensors that are read in part

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
        entries = [open_source(item, index, key) for index, item in enumerate(given)]
        for entry in entries:
            refuse_factors(entry)
        if prefix is None:
            entries = drop_prefixes(entries, self.module)
        else:
            entries = take_prefix(entries, prefix)
        entries = convert_names(entries, self.module)
        self.names: tuple[str, ...] = tuple(names) if names is not None else default_names(entries)
        check_names(self.names, len(entries))
        self._entries: dict[str, Entry] = dict(zip(self.names, entries, strict=True))
        self.layout: dict[str, TensorInfo] = common_layout(self._entries)
        self.scores = check_scores(scores, self.names)
        self.health = Health()
        self.whole: CheckpointCollection = self  # what `slice_rows` was called on
        self._taken = ""  # which checkpoints of runs these are, in words

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
        """Open the checkpoints of a folder, a sweep or a glob pattern, in natural order.

        Parameters
        ----------
        path : str, path-like, or an iterable of them
            A folder (all checkpoints in it: files, sharded ones once, Hugging Face and skorch
            folders), a sweep (a folder of runs, up to two folders down, as transformers' Trainer
            and Lightning leave them), a glob pattern (``"runs/**/*.safetensors"``,
            ``"runs/checkpoint-*"``), or one file or Hugging Face folder. ``~`` is your home.
        which : {"best", "last", "all"} or None, default=None
            Which of several checkpoints of one run: of one training, that is a folder with
            ``checkpoint-N`` folders, ``.ckpt`` files, or files named after an epoch, a step,
            ``best`` or ``last``. "best" is what ``trainer_state.json``, Lightning's
            ModelCheckpoint or the file's name calls so, else the last. By default the best of
            each run of a sweep, and all of a path that is one run. The repr says what was taken,
            and a line of the logger ``sksoup`` (level INFO) names them.
        module, key, prefix
            As in the constructor.
        scores : mapping of str to float, "recorded" or None, default=None
            As in the constructor; "recorded" takes those that the training wrote into
            ``trainer_state.json`` or its ``.ckpt`` files, negated where smaller is better.

        Returns
        -------
        collection : CheckpointCollection
            Ordered so that ``ft2`` comes before ``ft10``. Where runs are told apart, names are
            those of their folders.

        Raises
        ------
        CheckpointError
            Nothing is found; a folder is a checkpoint and holds more; recorded scores are missing,
            of several metrics, or it is not written whether greater is better; or as in the
            constructor.

        Notes
        -----
        The model that a Trainer saves in the run's folder in the end counts as its last
        checkpoint, unless its best is known; with "all" it is left out, as a copy of one of them.
        Checkpoints of one step count once.

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
        return {**self.__dict__, "health": Health()}

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
            Each tensor is on the CPU in its stored dtype and may be a view of the file: copy
            what is to outlive the context, and never write to it.

        Raises
        ------
        CheckpointError
            The file changed or can't be read, or a tensor holds NaN or Inf.
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
        """Read every tensor that has not been read yet and raise where one is not finite.

        Raises
        ------
        CheckpointError
            As `open`, naming file and tensor.
        """
        based: dict[int, str] = {}  # bases that were read, and with which checkpoint
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
        """Whether a tensor is the base's in both of two adapters, and was seen in the other."""
        for entry in (self._entries[name], self._entries[other]):
            found = entry.checkpoint
            if not isinstance(found, LowRankCheckpoint) or found.adds(entry.prefix + tensor):
                return False
        if name == other:
            return False
        return self.health.share(name, other, tensor)

    def on_one_base(self, names: Sequence[str] | None = None) -> dict[str, LowRankCheckpoint]:
        """Return these checkpoints by name if all of them are a base and something of low rank.

        Parameters
        ----------
        names : sequence of str or None, default=None
            Names of checkpoints; all of them by default.

        Returns
        -------
        adapters : dict of str to LowRankCheckpoint
            Empty where one is not, they have not one base, or names are without a prefix.
        """
        chosen = self.names if names is None else names
        adapters = self.adapters(chosen)
        bases = {id(one.base): one.base for one in adapters.values()}.values()
        is_one = len(bases) == 1 or len({repr(base.identity()) for base in bases}) == 1
        is_plain = not any(self._entries[name].prefix for name in chosen)
        return adapters if is_one and is_plain and len(adapters) == len(chosen) else {}

    def adapters(self, names: Iterable[str]) -> dict[str, LowRankCheckpoint]:
        """Return those of these checkpoints that are a base and something of low rank.

        Parameters
        ----------
        names : iterable of str
            Names of checkpoints.

        Returns
        -------
        adapters : dict of str to LowRankCheckpoint
            By name, in order.
        """
        found = {name: self._entries[name].checkpoint for name in names}
        return {name: one for name, one in found.items() if isinstance(one, LowRankCheckpoint)}

    @contextmanager
    def open_factors(self, name: str) -> Iterator[tuple[ReadFactors, Read]]:
        """Open what an adapter adds to its base: its factors, and the tensors that it holds whole.

        Parameters
        ----------
        name : str
            Name of a checkpoint that `on_one_base` returns.

        Yields
        ------
        factors : callable, tensor name -> Factors or None
            None where the tensor is the base's, or whole.
        read : callable, tensor name -> tensor
            As `open`, for tensors that are held whole.

        Raises
        ------
        CheckpointError
            As `open`.
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
            f"run has probably diverged: leave it out with collection.drop({name!r}), or all such "
            f"with collection.healthy()."
        )

    def describe(self) -> CollectionSummary:
        """Compare the checkpoints: distances, directions, duplicates, frozen parts, a verdict.

        Returns
        -------
        summary : CollectionSummary
            Print it, or use ``to_dict()``.

        Notes
        -----
        One read of all files; memory of one tensor, and of 256 numbers of each tensor of every
        checkpoint. Checkpoints are compared pair by pair and with their median, so that the related
        ones are recognised as long as they are the majority, however bad the others are: a
        checkpoint is unrelated whose median cosine to the others is below 0.5, or that lies more
        than 10 times as far from the median as is usual (more where the distances of a wide sweep
        are spread more). One that can't be read, or holds NaN, is a row with its ``problem``.

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

    def healthy(self) -> CheckpointCollection:
        """Return the collection without the checkpoints that would spoil a soup.

        Left out, with a warning that says why, is a checkpoint that can't be read, that holds NaN
        or infinite values, or that is unrelated to the others: one that `describe` says points
        elsewhere or lies far from them, such as a run that diverged.

        Returns
        -------
        collection : CheckpointCollection
            The others, in order, with their scores; this same object if nothing is wrong.

        Raises
        ------
        CheckpointError
            No checkpoint would be left.

        Warns
        -----
        SoupWarning
            Names what was left out.

        See Also
        --------
        drop : Leaves out by name.

        Notes
        -----
        One read of all files; nothing is changed. An infinite tensor that most checkpoints share,
        such as an attention mask, is allowed.

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
                f"readable, finite, and fine-tuned from one start: check how they were made."
            )
        warnings.warn(
            f"Left out {len(why)} of {len(self)} checkpoints: {said}.", SoupWarning, stacklevel=2
        )
        return self.drop(why)

    def relations(self, names: Iterable[str]) -> Relations:
        """Compare those of these checkpoints that were read, by a few numbers of each matrix.

        Parameters
        ----------
        names : iterable of str
            Checkpoints to compare.

        Returns
        -------
        relations : Relations
            ``relations.unrelated`` is a dict from names to what was measured. `describe` judges in
            the same way; here nothing is read, and networks with fewer than 64 numbers that differ
            are not judged, nor adapters of one base of which factors were read only.
        """
        adapters = self.on_one_base().values()
        changed = {tensor for one in adapters for tensor in one.ranks}
        # heads that are new in each of them say nothing of their start
        read = [name for name in names if not self.health.unread(name, changed)]
        return self.health.relations(read, self.layout)

    def strangers(self, names: Iterable[str]) -> list[str]:
        """Return those of these checkpoints that point elsewhere than the others, or lie far off.

        Parameters
        ----------
        names : iterable of str
            Checkpoints to compare; those that were not read yet are left out.

        Returns
        -------
        strangers : list of str
            Names, as in ``relations(names).unrelated``.
        """
        return list(self.relations(names).unrelated)

    def judged_by(self, health: Health) -> Self:
        """Return the same collection, with what is read given to another judge.

        Parameters
        ----------
        health : Health
            Sees every tensor that is read.

        Returns
        -------
        collection : CheckpointCollection
            Shares files and tensors with this one.
        """
        part = copy.copy(self)
        part.health = health
        return part

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
        dropped = self.select(names)
        return self.select(name for name in self if name not in dropped)

    def add(self, name: str, checkpoint: Any) -> CheckpointCollection:
        """Return a collection with one checkpoint more, such as the pretrained start.

        Parameters
        ----------
        name : str
            Its name.
        checkpoint : str, path-like, mapping of str to Tensor, or nn.Module
            What the constructor takes.

        Returns
        -------
        collection : CheckpointCollection
            These, in order, and the new one last. It has no ``scores``, as none is known of that.

        Raises
        ------
        ValueError
            A checkpoint has this name.
        CheckpointError
            As in the constructor: it can't be opened, or has other tensors than these.
        """
        if name in self:
            raise ValueError(f"{name!r} is in this collection: give the new one another name.")
        entries = {**self._entries, name: checkpoint}
        both = CheckpointCollection(entries, module=self.module)
        return self._with(both._entries)

    def _renamed(self, names: Mapping[str, str], tensors: Iterable[str]) -> Self:
        """Checkpoints by new names, without the prefixes that keep the tensors from these names."""
        entries = [self._entries[old] for old in names.values()]
        if self.layout.keys() != set(tensors):
            entries = fit_names([unconverted(entry) for entry in entries], set(tensors))
        return self._with(dict(zip(names, entries, strict=True)))

    def _with(self, entries: dict[str, Entry]) -> Self:
        """The same with these checkpoints, which take their scores along."""
        part = copy.copy(self)
        part.names, part._entries, part._taken = tuple(entries), entries, ""
        part.layout = common_layout(entries)
        if self.scores is not None:
            known = {name: score for name, score in self.scores.items() if name in entries}
            part.scores = known if len(known) == len(entries) else None
        part.health = Health()
        part.whole = part
        return part

    def slice_rows(self, rows: Mapping[str, slice]) -> CheckpointCollection:
        """Return the same checkpoints, of which only these rows (dimension 0) are read.

        Parameters
        ----------
        rows : mapping of str to slice
            By tensor name; a tensor that is not in it stays whole.

        Returns
        -------
        collection : CheckpointCollection
            Shares files and tensors with this one; nothing is read. Of a ``.safetensors`` file no
            other byte is read, a file of ``torch.save`` is mapped, and anything else (adapters,
            converted or legacy files) is read whole and cut.
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
        if len({path.resolve() for path in paths.values()}) < len(paths):
            raise ValueError(
                f"Two checkpoints would be written to one file in {str(root)!r}, such as 'a' and "
                f"'b/../a': give them other names, names=."
            )
        for path in paths.values():
            if root.resolve() not in path.resolve().parents:
                raise ValueError(f"{str(path)!r} would be outside {str(root)!r}: change its name.")
            if os.path.lexists(path):
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
            On the CPU, with whatever weights the factory gives. One that was wrapped with
            ``fully_shard`` is not copied, and stays where it is.

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
            if sharded_parts(self.module):  # can't be copied: it becomes the soup
                return self.module
            return copy.deepcopy(self.module).cpu()
        with preserved_random_state():
            module = self.module()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module={self.module!r} returned a {type(module).__name__}, expected an nn.Module."
            )
        if sharded_parts(module) or any(p.is_meta for p in module.parameters()):
            return module
        return module.cpu()

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
        return self._entries[name].checkpoint.path

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """Return the dtype of every tensor in a mix of these checkpoints: the promoted one."""
        headers = [self._entries[name].header for name in names]
        return {
            tensor: reduce(torch.promote_types, (header[tensor].dtype for header in headers))
            for tensor in self.layout
        }

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Walk the tensors that live in this collection itself, in no file.

        Yields
        ------
        tensor : Tensor
            Not a copy: never write to it.
        """
        for entry in self._entries.values():
            yield from entry.checkpoint.held_tensors()

    def warm(self, name: str) -> None:
        """Have the operating system read a checkpoint's file into its cache, in the background.

        Parameters
        ----------
        name : str
            Name of the checkpoint; one in memory is warm already.
        """
        self._entries[name].checkpoint.warm()

    def identity(self, name: str) -> tuple[Any, ...]:
        """Return what distinguishes a checkpoint from one that took its place.

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
        return (entry.prefix, *entry.checkpoint.identity())

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
        entry = self._entries[name]
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
            64 hexadecimal digits; the same in memory and in a file of any format. Of a LoRA adapter
            it is that of its own tensors and their scales, without the base.
        """
        entry = self._entries[name]
        if isinstance(entry.checkpoint, LowRankCheckpoint):
            return entry.checkpoint.content_sha256()
        return content_sha256(entry)

    def _key(self, name: str) -> str | None:
        """Which state dict of its container a checkpoint is, where ``key`` was given."""
        return self._entries[name].checkpoint.key

    @contextmanager
    def hashing(self) -> Iterator[None]:
        """Compute `sha256` of the checkpoints in a background thread, until the context ends."""
        stop = threading.Event()

        def run() -> None:
            for name in self.names:
                with suppress(Exception):  # which is raised where the digest is asked for
                    if not stop.is_set():
                        self.sha256(name)

        threading.Thread(target=run, name="sksoup-sha256", daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    def __sklearn_clone__(self) -> CheckpointCollection:
        if multiprocessing.parent_process() is None:  # searches clone before they send to workers
            self.n_threads_of_parent = torch.get_num_threads()
        return self

    @contextmanager
    def threads_of_parent(self) -> Iterator[None]:
        """In a worker, compute with as many threads as the process that sent this collection.

        joblib gives its workers fewer, which would change the last bits of sums. (Soups are cloned
        on the way, collections are not.)
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
