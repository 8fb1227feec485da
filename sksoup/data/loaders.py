"""Read inputs and targets from data sets and loaders of any kind, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice, pairwise
from numbers import Integral
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from ..runtime.fingerprint import tensor_bytes
from ..runtime.memory import free_bytes
from ..runtime.random_state import preserved_random_state
from .arrays import map_inputs, n_rows, parts_of
from .batches import LABELS, split
from .indexed import IndexedRows, as_loader, can_be_read_again
from .tokens import IGNORED

SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
MASK = "attention_mask"
# whose texts are padded: those of causal models also without a mask, as they do not look ahead
Pads: TypeAlias = Literal["causal", "any"]


class Padded(dict[str, torch.Tensor]):
    """Texts of several lengths, whose attention mask is not from the user but was created."""


def as_batches(X: Any, y: Any) -> Any:
    """Turn a mapping with its targets into a single batch; return anything else unchanged."""
    holds_targets = isinstance(X, Mapping) and (
        isinstance(y, str) or (y is None and any(name in X for name in LABELS))
    )
    if not holds_targets:
        return X
    is_list = {name: isinstance(part, (list, tuple)) for name, part in X.items()}
    return iter([{n: from_lists(part) if is_list[n] else part for n, part in X.items()}])


def from_lists(part: Sequence[Any]) -> NDArray[Any]:
    """Lists of numbers as an array: integers stay integers."""
    try:
        return np.asarray(part)
    except ValueError as error:
        raise ValueError(
            "An input in X holds lists of different lengths, expected one length. Pad them: "
            "tokenizer(texts, padding=True, truncation=True, return_tensors='pt')."
        ) from error


def is_apart(values: Any) -> bool:
    """Whether targets or weights are passed separately, so that rows must come in order."""
    return values is not None and not isinstance(values, str)


def read_loader(
    X: Any,
    y: Any = None,
    *,
    ordered: bool = False,
    n_inputs: int | None = None,
    pads: Pads | None = None,
    keep: int | None = None,
) -> tuple[Any, Any]:
    """Read a loader once; inputs and targets as tensors on the CPU, targets as in `walk`.

    If a data set does not fit into memory, only its first rows are kept, and the inputs are
    `IndexedRows`. With ``pads``, batches may be texts of different lengths, which are padded to the
    longest. ``keep`` limits the bytes that are kept, which are never more than half of the free
    memory.
    """
    inputs: list[Any] = []
    targets: list[Any] = []
    held = 0
    limit = free_bytes(torch.device("cpu")) // 2
    loader = None if isinstance(X, Iterator) or pads else as_loader(X)
    can_leave_out = loader is not None and can_be_read_again(loader)
    if can_leave_out and keep is not None:
        limit = min(limit, keep)
    digest, is_full = sha256(), False
    for rows, labels in _with_labels(walk(X, y, ordered=ordered, n_inputs=n_inputs), pads):
        targets.append(labels)
        if can_leave_out:
            note_rows(digest, rows)
        if is_full:
            continue
        inputs.append(rows)
        held += sum(part.nbytes for part in parts_of(rows))
        if held > limit and not can_leave_out:
            raise ValueError(
                f"The held-out rows do not fit into memory: {held:,} bytes after "
                f"{sum(map(n_rows, inputs)):,} rows, more than half of the free memory. Pass a "
                f"data set with indices, or a DataLoader of one with shuffle=False, so that rows "
                f"are read when they are needed; or hold out fewer rows."
            )
        while held > limit or (is_full and held > limit // 2):  # joining them takes as much again
            is_full = True
            held -= sum(part.nbytes for part in parts_of(inputs.pop()))
    makes_mask = False
    if pads:
        own = [isinstance(X, Mapping) and MASK in X for X in inputs]
        inputs, targets = _padded_inputs(inputs, pads), padded(targets, IGNORED)
        makes_mask = not all(own) and isinstance(inputs[0], Mapping) and MASK in inputs[0]
    labels = targets_of(targets, y)
    if loader is not None and is_full:
        kept = _concatenate(inputs) if inputs else None
        n_inputs = len(rows) if isinstance(rows, tuple) else n_inputs
        read = partial(split, y=y, n_inputs=n_inputs, is_collated=is_collated(loader))
        known = None if is_apart(y) else labels
        return IndexedRows(loader, read, kept, digest.hexdigest(), known), labels
    found = _concatenate(inputs)
    return Padded(found) if makes_mask else found, labels


def note_rows(digest: Any, rows: Any) -> None:
    """Add rows to a digest; raise an error if they are not finite, as scikit-learn does."""
    if isinstance(rows, (Mapping, tuple)):  # which input is which
        digest.update(repr([*rows] if isinstance(rows, Mapping) else len(rows)).encode())
    for part in parts_of(rows):
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            raise ValueError("Input X contains NaN or infinite values, expected finite numbers.")
        digest.update(f"{part.dtype}{tuple(part.shape[1:])}".encode())
        digest.update(tensor_bytes(part))


def _with_labels(
    batches: Iterator[tuple[Any, torch.Tensor | None]], pads: Pads | None
) -> Iterator[tuple[Any, torch.Tensor | None]]:
    """Batches of causal models, in which ids without a name are the labels, too: not padded yet."""
    for rows, labels in batches:
        are_labels = pads == "causal" and labels is None and _is_sequence(rows)
        yield rows, rows if are_labels else labels


def _padded_inputs(inputs: list[Any], pads: Pads) -> list[Any]:
    """Batches of texts, padded at the end to the longest one.

    Padded with 0 and masked by the attention mask, which is created if there is none, so that
    bidirectional models ignore the padding. Ids without a name have no mask.
    """
    columns = zip(*map(parts_of, inputs), strict=False)
    lengths = max(map(_lengths, columns), key=len, default=set[int]())
    has_masks = all(isinstance(X, Mapping) and {MASK, "input_ids"} & X.keys() for X in inputs)
    if len(lengths) > 1 and pads != "causal" and not has_masks:
        raise ValueError(
            f"X holds texts of {min(lengths)} to {max(lengths)} tokens without an attention mask, "
            f"so that models would read the padding as text. Pass batches with names, such as "
            f"{{'input_ids': ids}}, for which a mask is created, or texts of one length; or "
            f"task='causal-lm' if the model predicts the next token."
        )
    return padded(inputs)


def padded(parts: list[Any], value: int = 0) -> list[Any]:
    """Batches, padded at the end to the longest one; named inputs get an attention mask."""
    if not any(isinstance(X, Mapping) for X in parts):
        return _filled(parts, value)
    differ = any(len(_lengths([X.get(name) for X in parts])) > 1 for name in parts[0])
    if differ or any(MASK in X for X in parts):
        parts = [_with_mask(X) for X in parts]
    if any(X.keys() != parts[0].keys() for X in parts):  # an error where they are joined
        return parts
    named = {name: _filled([X[name] for X in parts], value) for name in parts[0]}
    return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]


def _filled(parts: Sequence[Any], value: int) -> list[Any]:
    """One input of all batches, padded to one length."""
    longest = max((part.shape[1] for part in parts if _is_sequence(part)), default=0)
    return [
        nn.functional.pad(part, (0, longest - part.shape[1]), value=value)
        if _is_sequence(part)
        else part
        for part in parts
    ]


def _lengths(parts: Iterable[Any]) -> set[int]:
    """The numbers of tokens in the batches of one input."""
    return {part.shape[1] for part in parts if _is_sequence(part)}


def _is_sequence(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.ndim == 2 and not part.is_floating_point()


def _with_mask(X: Any) -> Any:
    if not isinstance(X, Mapping) or MASK in X or "input_ids" not in X:
        return X
    return {**X, MASK: torch.ones_like(X["input_ids"])}


def minibatches(
    X: Any,
    y: Any,
    size: int | None,
    *,
    ordered: bool,
    n_inputs: int | None,
    pads: Pads | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Read a loader once, in minibatches of ``size`` rows as for arrays; None is one batch."""
    if size is None:
        yield read_loader(X, y, ordered=ordered, n_inputs=n_inputs, pads=pads)
        return
    held: list[tuple[Any, Any]] = []  # batches that were read and not given yet
    n = 0
    for batch in _with_labels(walk(X, y, ordered=ordered, n_inputs=n_inputs), pads):
        held.append(batch)
        n += n_rows(batch[0])
        if n >= size:
            rows, labels = _joined(held, pads)
            for start in range(0, n - n % size, size):
                part = slice(start, start + size)
                yield _cut(rows, part), _cut(labels, part)
            n %= size
            rest = slice(n_rows(rows) - n, None)
            held = [(_cut(rows, rest), _cut(labels, rest))] if n else []
    if n:
        yield _joined(held, pads)


def _joined(batches: list[tuple[Any, Any]], pads: Pads | None) -> tuple[Any, Any]:
    """The rows and the labels of several batches, copied once."""
    rows = [each for each, _ in batches]
    labels = [each for _, each in batches if each is not None]
    if pads:
        rows, labels = _padded_inputs(rows, pads), padded(labels, IGNORED)
    return _concatenate(rows), targets_of(labels, None)


def _cut(X: Any, rows: slice) -> Any:
    return None if X is None else map_inputs(itemgetter(rows), X)


def targets_of(targets: list[Any], y: Any) -> Any:
    """The targets that came with the rows, unless they were passed separately as ``y``."""
    if is_apart(y):
        return y
    found = [part for part in targets if part is not None]
    return torch.cat(found) if found else None


def walk(
    X: Any, y: Any, *, ordered: bool, n_inputs: int | None
) -> Iterator[tuple[Any, torch.Tensor | None]]:
    """Inputs and targets batch by batch, without changing the global random state.

    Batches contain targets if ``y`` is None or the name of a key: the last item of a tuple (unless
    it has only ``n_inputs`` items), or a key of a mapping. Several inputs may be in a tuple of
    their own; a list that could also hold the rows of one input is read as in the first batch. With
    ``ordered``, loaders that shuffle raise an error.
    """
    if isinstance(X, IndexedRows):
        loader: Any = X.walk()
    else:
        loader = X if isinstance(X, Iterator) else as_loader(X)
    if ordered:
        _check_order(loader)
    is_empty = True
    with preserved_random_state():
        for batch in _stacked(loader):
            rows, labels = split(batch, y, n_inputs, is_collated(loader))
            n_inputs = len(rows) if isinstance(rows, tuple) else n_inputs
            is_empty = is_empty and not n_rows(rows)
            yield rows, None if labels is None else _numbers(labels)
    if is_empty:
        raise ValueError(
            f"The {type(X).__name__} returned no rows: an iterator can be used only once. Pass a "
            f"DataLoader or a Dataset."
        )


def is_collated(loader: Any) -> bool:
    """Whether torch's default collate makes the batches."""
    return isinstance(loader, DataLoader) and loader.collate_fn is default_collate


def _numbers(labels: Any) -> torch.Tensor:
    """The targets in a batch as a tensor; raise an error for texts."""
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        first = labels[0] if len(labels) else labels
        raise TypeError(
            f"The targets in the rows can't be converted to a tensor: the first is {first!r}, "
            f"expected a number. Pass strings separately, fit(checkpoints, X, y), and remove them "
            f"from X (rows.remove_columns('label') for a datasets.Dataset)."
        ) from error


def _stacked(loader: Any) -> Iterator[Any]:
    """The batches; raise an error for rows of several lengths, which can't be stacked."""
    try:
        yield from loader
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise ValueError(
            f"The rows of a batch have different shapes, expected one shape: "
            f"{str(error).strip().splitlines()[-1]}. Pad texts to one length, as with "
            f"tokenizer(texts, padding='max_length', truncation=True), or pass a DataLoader whose "
            f"collate_fn pads all batches to one length."
        ) from error


def _check_order(loader: Any) -> None:
    """Raise an error if a DataLoader does not return all rows in the order of the data set."""
    if not isinstance(loader, DataLoader):
        return
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = sampler.sampler if type(sampler) is BatchSampler else sampler
    if isinstance(sampler, DistributedSampler):
        raise ValueError(
            f"The DataLoader has a {type(sampler).__name__}, which gives each rank a part of the "
            f"rows, but all rows are needed in the order of the data set. Pass a DataLoader "
            f"without a sampler: sksoup distributes the rows between the ranks itself."
        )
    if isinstance(sampler, SHUFFLING):
        raise ValueError(
            f"The DataLoader shuffles ({type(sampler).__name__}), but the rows are needed in the "
            f"order of the data set. Pass a DataLoader with shuffle=False."
        )
    if not isinstance(loader.dataset, IterableDataset) and not _is_in_order(sampler, loader):
        raise ValueError(
            f"The DataLoader has a sampler ({type(sampler).__name__}) that does not return the "
            f"rows in the order of the data set, in which they are needed. Pass a DataLoader "
            f"without a sampler, or one whose batches contain the labels to fit and score."
        )
    batches = loader if loader.batch_size is not None else loader.batch_sampler
    drops = getattr(batches, "drop_last", False)
    n = len(loader.dataset) if drops and hasattr(loader.dataset, "__len__") else 0
    if lost := n % (getattr(batches, "batch_size", None) or 1):
        raise ValueError(
            f"The DataLoader has drop_last=True, which leaves out {lost} of {n} rows. Pass one "
            f"with drop_last=False."
        )


def _is_in_order(sampler: Any, loader: DataLoader[Any]) -> bool:
    """Whether a sampler gives increasing indices and, unless it is a list, those of all rows."""
    if type(sampler) is SequentialSampler:
        return True
    if isinstance(sampler, Iterator) or not hasattr(loader.dataset, "__len__"):
        return False
    n = len(loader.dataset)
    is_list = isinstance(sampler, (Sequence, np.ndarray, torch.Tensor))  # a part, on purpose
    with preserved_random_state():
        found = list(islice(_flat(sampler), n + 1))
    if not all(isinstance(index, Integral) for index in found):  # keys
        return is_list
    return all(a < b for a, b in pairwise(found)) and (is_list or len(found) == n)


def _flat(indices: Any) -> Iterator[Any]:
    """Indices, of which some may be in lists: batches."""
    for index in indices:
        found = index.tolist() if isinstance(index, (np.ndarray, torch.Tensor)) else index
        if isinstance(found, Sequence) and not isinstance(found, str):
            yield from found
        else:
            yield found


def _concatenate(inputs: list[Any]) -> Any:
    first = inputs[0]
    for other in inputs[1:]:
        kinds = [list(X) if isinstance(X, dict) else len(parts_of(X)) for X in (first, other)]
        shapes = [[tuple(part.shape[1:]) for part in parts_of(X)] for X in (first, other)]
        if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
            raise ValueError(
                f"Batches differ: some have rows of shape {shapes[0]} ({kinds[0]}), others of "
                f"shape {shapes[1]} ({kinds[1]}). Pad all batches to one shape; texts, for "
                f"example, with DataCollatorWithPadding(tokenizer, padding='max_length', "
                f"max_length=128)."
            )
    if isinstance(first, dict):
        return {name: torch.cat([X[name] for X in inputs]) for name in first}
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*inputs, strict=True))
    return torch.cat(inputs)
