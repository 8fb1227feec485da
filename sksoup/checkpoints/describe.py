"""Do these checkpoints belong together? Distances, directions, duplicates, and a plain verdict."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from ..runtime.fingerprint import tensor_bytes
from ..tables import Table
from .health import UNRELATED
from .protocol import Read, TensorInfo


class Openable(Protocol):
    """What a description needs of a collection."""

    names: tuple[str, ...]
    layout: dict[str, TensorInfo]
    scores: dict[str, float] | None

    def open(self, name: str) -> AbstractContextManager[Read]: ...


@dataclass(frozen=True)
class CheckpointSummary:
    """Hold what `CheckpointCollection.describe` found of one checkpoint.

    Parameters
    ----------
    name : str
        Its name.
    norm : float
        Length of its weight vector.
    distance : float
        Length of its delta: distance to the mean of all checkpoints.
    cosine : float
        Between its weights and the mean of the others' weights, over the matrices that differ;
        near 1 for fine-tunings of one start, near 0 for networks that share none. NaN for a single
        checkpoint.
    score : float or None
        Known held-out score.
    same_as : str or None
        The first checkpoint with the same weights.

    Examples
    --------
    >>> from sksoup import CheckpointCollection
    >>> a = {"w": __import__("torch").ones(2, 2)}
    >>> CheckpointCollection({"a": a, "b": a}).describe().checkpoints[1].same_as
    'a'
    """

    name: str
    norm: float
    distance: float
    cosine: float
    score: float | None
    same_as: str | None


@dataclass(frozen=True)
class CollectionSummary:
    """Hold what `CheckpointCollection.describe` found; printed, it is a table and a verdict.

    Parameters
    ----------
    checkpoints : tuple of CheckpointSummary
        One each, in order.
    n_parameters : int
        Floating numbers in one checkpoint.
    dtypes : dict of str to int
        Number of tensors by dtype.
    identical : tuple of str
        Tensors whose bits are the same everywhere: frozen parts, or all of them in copies.
    verdict : tuple of str
        What this means for a soup, in plain words.

    Examples
    --------
    >>> from sksoup import CheckpointCollection
    >>> a = {"w": __import__("torch").ones(2, 2)}
    >>> print(CheckpointCollection({"a": a, "b": a}).describe().verdict[-1])
    All checkpoints are the same: a soup of them is that checkpoint.
    """

    checkpoints: tuple[CheckpointSummary, ...]
    n_parameters: int
    dtypes: dict[str, int]
    identical: tuple[str, ...]
    verdict: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain dicts and lists.

        Returns
        -------
        summary : dict
            Ready for JSON; NaN is None.
        """
        plain = asdict(self)
        for row in plain["checkpoints"]:
            row["cosine"] = None if math.isnan(row["cosine"]) else row["cosine"]
        return plain

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                f"{row.norm:.4g}",
                f"{row.distance:.4g}",
                "-" if math.isnan(row.cosine) else f"{row.cosine:.4f}",
                "-" if row.score is None else f"{row.score:.4f}",
                f"same as {row.same_as}" if row.same_as else "",
            )
            for row in self.checkpoints
        ]
        header = ("name", "norm", "distance", "cosine", "score", "")
        lines = [Table(header, rows, left=(0, 5)).to_text()]
        kinds = ", ".join(f"{n} {dtype}" for dtype, n in self.dtypes.items())
        lines.append(
            f"{self.n_parameters:,} floating numbers each; tensors: {kinds}; "
            f"{len(self.identical)} identical everywhere"
        )
        lines.append("distance: to the mean of all; cosine: to the mean of the others")
        return "\n".join([*lines, *self.verdict])


def describe(collection: Openable) -> CollectionSummary:
    """Stream all checkpoints twice: once for their mean, once for distances and digests."""
    floating = [name for name, info in collection.layout.items() if info.is_floating]
    mean = _mean(collection, floating)
    names, K = collection.names, len(collection.names)
    center = {tensor: _dot(value, value) for tensor, value in mean.items()}
    digests: dict[str, dict[str, bytes]] = {name: {} for name in names}
    # per checkpoint and tensor: |w|^2, <w, mean>, |w - mean|^2
    sums = {name: dict.fromkeys(mean, (0.0, 0.0, 0.0)) for name in names}
    for name in names:
        with collection.open(name) as read:
            for tensor in collection.layout:
                value = read(tensor)
                digests[name][tensor] = _digest(value)
                if tensor in mean:
                    w, m = value.double().flatten(), mean[tensor].flatten()
                    sums[name][tensor] = _dot(w, w), _dot(w, m), _dot(w - m, w - m)
    first: dict[tuple[bytes, ...], str] = {}
    same_as: list[str | None] = []
    for name in collection.names:
        known = first.setdefault(tuple(digests[name].values()), name)
        same_as.append(None if known == name else known)
    identical = tuple(
        tensor
        for tensor in collection.layout
        if len({digests[name][tensor] for name in names}) == 1
    )
    # scales of norms start at 1 in every network: directions are told by matrices, if there are any
    differing = [tensor for tensor in mean if tensor not in identical]
    telling = [t for t in differing if len(collection.layout[t].shape) > 1] or differing
    summaries = []
    for name, same in zip(names, same_as, strict=True):
        square, product, middle = (
            sum(sums[name][t][0] for t in telling),
            sum(sums[name][t][1] for t in telling),
            sum(center[t] for t in telling),
        )
        summaries.append(
            CheckpointSummary(
                name,
                norm=math.sqrt(sum(values[0] for values in sums[name].values())),
                distance=math.sqrt(sum(values[2] for values in sums[name].values())),
                cosine=_cosine(K, square, product, middle),
                score=None if collection.scores is None else collection.scores[name],
                same_as=same,
            )
        )
    dtypes: dict[str, int] = {}
    for info in collection.layout.values():
        dtype = str(info.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    n_parameters = sum(math.prod(collection.layout[tensor].shape) for tensor in floating)
    return CollectionSummary(
        tuple(summaries),
        n_parameters,
        dtypes,
        identical,
        _verdict(summaries, identical, collection),
    )


def _mean(collection: Openable, floating: Sequence[str]) -> dict[str, torch.Tensor]:
    """Mean of the floating tensors, float64; infinite constants are left out."""
    mean: dict[str, torch.Tensor] = {}
    for name in collection.names:
        with collection.open(name) as read:
            for tensor in floating:
                value = read(tensor).double()
                mean[tensor] = mean[tensor].add_(value) if tensor in mean else value.clone()
    return {
        tensor: value / len(collection.names)
        for tensor, value in mean.items()
        if bool(torch.isfinite(value).all())
    }


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _digest(value: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor_bytes(value)).digest()


def _cosine(K: int, square: float, product: float, center: float) -> float:
    """cos(w_k, mean of the others) from |w_k|^2, <w_k, mean of all> and |mean of all|^2."""
    if K < 2:
        return math.nan
    others = (K * product - square) / (K - 1)  # <w_k, m>
    length = math.sqrt(max(0.0, K**2 * center - 2 * K * product + square)) / (K - 1)  # |m|
    return others / (math.sqrt(square) * length) if square > 0 and length > 0 else 1.0


def _verdict(
    summaries: Sequence[CheckpointSummary], identical: Sequence[str], collection: Openable
) -> tuple[str, ...]:
    said = []
    copies = [row.name for row in summaries if row.same_as]
    if len(summaries) == 1:
        return ("One checkpoint: nothing to mix.",)
    if len(copies) == len(summaries) - 1:
        return ("All checkpoints are the same: a soup of them is that checkpoint.",)
    if copies:
        said.append(
            f"{_listed(copies)} {'repeats' if len(copies) == 1 else 'repeat'} other checkpoints: "
            f"in a mean, equal ones count each time."
        )
    if identical:
        said.append(
            f"{len(identical)} of {len(collection.layout)} tensors are the same everywhere (frozen "
            f"parts): they cost nothing to search."
        )
    strangers = [row.name for row in summaries if row.cosine < UNRELATED]
    said.append(judge(strangers, len(summaries)))
    return tuple(said)


def judge(strangers: Sequence[str], n: int) -> str:
    """Say what it means that these of n checkpoints point elsewhere than the others."""
    if not strangers:
        return "These ingredients lie close together, as fine-tunings of one start do: good to mix."
    if 2 * len(strangers) >= n:
        return (
            f"These ingredients do not share a start: {len(strangers)} of {n} point elsewhere than "
            f"the others (cosine below {UNRELATED}). A soup of them will be noise. Fine-tune all "
            f"from one pretrained start, with lower learning rates."
        )
    return (
        f"{_listed(strangers)} {'does' if len(strangers) == 1 else 'do'} not share a start with "
        f"the others (cosine below {UNRELATED}): leave out with collection.drop(...)."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
