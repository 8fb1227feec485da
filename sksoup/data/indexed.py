"""Held-out rows larger than memory, read by index when they are needed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from ..runtime.fingerprint import tensor_bytes
from ..runtime.random_state import preserved_random_state
from .arrays import Inputs, map_inputs, n_rows, parts_of

ROWS = 256  # read at a time where all are walked


class ArrayRows(Dataset[Any]):
    """The rows of an array in a file, such as ``np.load(path, mmap_mode="r")`` gives."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> NDArray[Any]:
        return np.array(self._array[index])

    def __getitems__(self, indices: list[int]) -> NDArray[Any]:
        """Several at once, as one array."""
        return np.asarray(self._array[indices])


def as_loader(X: Any) -> DataLoader[Any]:
    """A loader of a data set's rows in their order, from a data set or an array in a file."""
    if isinstance(X, DataLoader):
        return X
    if isinstance(X, np.memmap):
        return DataLoader(ArrayRows(X), batch_size=ROWS, collate_fn=torch.as_tensor)
    if hasattr(X, "with_format"):  # datasets.Dataset
        return _hub_loader(X)
    return DataLoader(X, batch_size=ROWS, shuffle=False)


def _hub_loader(X: Any) -> DataLoader[Any]:
    """A loader of a datasets.Dataset: its own transform and choice of columns are kept."""
    own = getattr(X, "format", {})
    if own.get("type") == "custom":  # set_transform
        return DataLoader(X, batch_size=ROWS, collate_fn=_collate)
    chosen = {name: own[name] for name in ("columns", "output_all_columns") if name in own}
    if own.get("type") != "torch":  # whose options, such as a dtype, are kept
        X = X.with_format("torch", **chosen)
    return DataLoader(X, batch_size=ROWS, shuffle=False)


def _collate(rows: list[dict[str, Any]]) -> Any:
    """A batch of rows in which tensors may still be lists, as tokenizers return them."""
    return default_collate(
        [
            {name: np.array(part) if isinstance(part, list) else part for name, part in row.items()}
            for row in rows
        ]
    )


def can_be_read_again(loader: DataLoader[Any]) -> bool:
    """Whether the loader always returns the rows in the order of the data set."""
    return (
        not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__len__")
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.batch_sampler.sampler) is SequentialSampler
        and not loader.drop_last
    )


class IndexedRows:
    """Rows of a data set; the first ones are in memory, the others are read when needed.

    Parameters
    ----------
    loader : DataLoader
        Loader of a map-style data set. Its workers, collate function and pinned memory are used,
        but not its batches.
    split : callable, batch -> (inputs, targets or None)
        Separates the targets, which are known from the first pass.
    kept : inputs of shape (n_kept, ...)
        The first rows, in their own dtypes.
    digest : str
        SHA-256 of all inputs.
    targets : Tensor or None
        The targets in the batches of the first pass: a loader that gives others later does not
        give the rows in the order of their indices.
    """

    def __init__(
        self, loader: DataLoader[Any], split: Any, kept: Inputs | None, digest: str,
        targets: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self._loader, self._split, self.kept, self.digest = loader, split, kept, digest
        self._targets = targets
        self._rows = torch.arange(len(cast(Sized, loader.dataset)))
        self.n_read = 0  # number of rows that were read again

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def n_kept(self) -> int:
        """How many of the data set's rows are in memory."""
        return 0 if self.kept is None else n_rows(self.kept)

    @property
    def nbytes(self) -> int:
        """Of what is in memory."""
        return 0 if self.kept is None else sum(int(part.nbytes) for part in parts_of(self.kept))

    def select(self, rows: torch.Tensor) -> IndexedRows:
        """Some of the rows; nothing is read, and what is in memory is shared."""
        part = copy.copy(self)
        part._rows = self._rows[rows.cpu()]
        chosen = tensor_bytes(part._rows)
        part.digest = hashlib.sha256(self.digest.encode() + bytes(chosen)).hexdigest()
        return part

    def take(self, rows: torch.Tensor) -> Inputs:
        """These rows, in this order."""
        (found,) = self.batches([rows])
        return found

    def batches(self, parts: Sequence[torch.Tensor]) -> Iterator[Inputs]:
        """Rows part by part; the loader's workers read ahead what is not in memory."""
        wanted = [self._rows[part.cpu()] for part in parts]
        missing = [rows[rows >= self.n_kept] for rows in wanted]
        read = iter(self._read([rows.tolist() for rows in missing if len(rows)]))
        for rows, others in zip(wanted, missing, strict=True):
            found = next(read) if len(others) else None
            self.n_read += len(others)
            yield self._merged(rows, found)

    def walk(self, size: int = ROWS) -> Iterator[Inputs]:
        """All rows, in order."""
        everything = torch.arange(len(self))
        return self.batches([everything[i : i + size] for i in range(0, len(self), size)])

    def _read(self, indices: list[list[int]]) -> Iterator[Inputs]:
        """Batches of these rows of the data set."""
        if not indices:
            return
        loader = self._loader
        again: DataLoader[Any] = DataLoader(
            loader.dataset, batch_sampler=indices, num_workers=loader.num_workers,
            collate_fn=loader.collate_fn, worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
        )  # fmt: skip
        with preserved_random_state():
            for rows, batch in zip(indices, again, strict=True):
                X, labels = self._split(batch)
                self._check_order(rows, n_rows(X), labels)
                yield X

    def _check_order(self, rows: list[int], n_read: int, labels: Any) -> None:
        """Refuse batches that are not the rows asked for, as their targets show."""
        is_other = n_read != len(rows)
        if not is_other and self._targets is not None and labels is not None:
            is_other = not torch.equal(torch.as_tensor(labels), self._targets[rows])
        if is_other:
            raise ValueError(
                "The rows do not fit into memory, and when they are read again by index, they have "
                "other targets than in the first pass. Give a collate_fn that keeps the order of "
                "the rows and their number, and a data set that gives the same row each time; or "
                "use fewer rows."
            )

    def _merged(self, rows: torch.Tensor, read: Any) -> Any:
        """The rows that are kept and those that were read, in the order asked for."""
        is_kept = rows < self.n_kept
        if read is None:
            return map_inputs(lambda part: part[rows], self.kept)
        if not bool(is_kept.any()):
            return read
        merged = map_inputs(lambda part: part[rows[is_kept]], self.kept)

        def place(kept: torch.Tensor, other: Any) -> torch.Tensor:
            both = kept.new_empty((len(rows), *kept.shape[1:]))
            both[is_kept], both[~is_kept] = kept, other
            return both

        if isinstance(merged, dict):
            return {name: place(part, read[name]) for name, part in merged.items()}
        if isinstance(merged, tuple):
            return tuple(map(place, merged, read))
        return place(merged, read)
