"""Do these checkpoints belong together? Distances, directions, duplicates, and a plain verdict."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
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
    names, layout, K = collection.names, collection.layout, len(collection.names)
    mean = _mean(collection)
    center = {tensor: _dot(value, value) for tensor, value in mean.items()}
    digests: dict[str, dict[str, bytes]] = {name: {} for name in names}
    # per checkpoint and tensor: |w|^2, <w, mean>, |w - mean|^2
    sums: dict[str, dict[str, tuple[float, float, float]]] = {name: {} for name in names}
    for name in names:
        with collection.open(name) as read:
            for tensor in layout:
                value = read(tensor)
                digests[name][tensor] = hashlib.sha256(tensor_bytes(value)).digest()
                if tensor in mean:
                    w, m = value.double(), mean[tensor]
                    sums[name][tensor] = _dot(w, w), _dot(w, m), _dot(w - m, w - m)
    same = [tensor for tensor in layout if len({digests[name][tensor] for name in names}) == 1]
    # scales of norms start at 1 in every network: directions are those of matrices, if any differ
    differing = [tensor for tensor in mean if tensor not in same]
    compared = [tensor for tensor in differing if len(layout[tensor].shape) > 1] or differing
    summaries = []
    first: dict[tuple[bytes, ...], str] = {}
    for name in names:
        copied = first.setdefault(tuple(digests[name].values()), name)
        square = sum(sums[name][t][0] for t in compared)
        product = sum(sums[name][t][1] for t in compared)
        summaries.append(
            CheckpointSummary(
                name,
                norm=math.sqrt(sum(values[0] for values in sums[name].values())),
                distance=math.sqrt(sum(values[2] for values in sums[name].values())),
                cosine=_cosine(K, square, product, sum(center[t] for t in compared)),
                score=None if collection.scores is None else collection.scores[name],
                same_as=None if copied == name else copied,
            )
        )
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in layout.values())
    return CollectionSummary(
        tuple(summaries),
        sum(info.size for info in layout.values() if info.is_floating),
        dict(dtypes),
        tuple(same),
        _verdict(summaries, len(same), len(layout)),
    )


def _mean(collection: Openable) -> dict[str, torch.Tensor]:
    """Mean of the floating tensors, float64; infinite constants are left out."""
    mean: dict[str, torch.Tensor] = {}
    for name in collection.names:
        with collection.open(name) as read:
            for tensor, info in collection.layout.items():
                if info.is_floating:
                    value = read(tensor).double()
                    mean[tensor] = mean[tensor].add_(value) if tensor in mean else value.clone()
    return {
        tensor: value / len(collection.names)
        for tensor, value in mean.items()
        if bool(torch.isfinite(value).all())
    }


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _cosine(K: int, square: float, product: float, center: float) -> float:
    """cos(w_k, mean of the others) from |w_k|^2, <w_k, mean of all> and |mean of all|^2."""
    if K < 2:
        return math.nan
    others = (K * product - square) / (K - 1)  # <w_k, m>
    length = math.sqrt(max(0.0, K**2 * center - 2 * K * product + square)) / (K - 1)  # |m|
    return others / (math.sqrt(square) * length) if square > 0 and length > 0 else 1.0


def _verdict(
    summaries: Sequence[CheckpointSummary], n_identical: int, n_tensors: int
) -> tuple[str, ...]:
    if len(summaries) == 1:
        return ("One checkpoint: nothing to mix.",)
    copies = [row.name for row in summaries if row.same_as]
    if len(copies) == len(summaries) - 1:
        return ("All checkpoints are the same: a soup of them is that checkpoint.",)
    verdict = []
    if copies:
        verdict.append(
            f"{_listed(copies)} {'repeats' if len(copies) == 1 else 'repeat'} other checkpoints: "
            f"in a mean, equal ones count each time."
        )
    if n_identical:
        verdict.append(
            f"{n_identical} of {n_tensors} tensors are the same everywhere (frozen parts): they "
            f"cost nothing to search."
        )
    strangers = [row.name for row in summaries if row.cosine < UNRELATED]
    return (*verdict, judge(strangers, len(summaries)))


def judge(strangers: Sequence[str], n: int) -> str:
    """What it means for a soup that these of n checkpoints point elsewhere than the others."""
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
