"""Do these checkpoints belong together? Distances, directions, duplicates, and a plain verdict."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..runtime.fingerprint import tensor_bytes
from ..tables import Table, notebook_html, shortened
from .relations import UNRELATED, Relations
from .survey import Openable, Survey, judge, judge_soups, listed, remedy, survey, usable

HEADER, LEFT = ("name", "norm", "distance", "cosine", "score", ""), (0, 5)


@dataclass(frozen=True, repr=False)
class CheckpointSummary:
    """Hold what `CheckpointCollection.describe` found of one checkpoint.

    Parameters
    ----------
    name : str
        Its name.
    norm : float
        Length of its weight vector; NaN where that can't be read.
    distance : float
        Distance to the median of all checkpoints, over the matrices that differ. Estimated from 256
        numbers of each matrix, exact where none has more; the median is taken number by number, so
        that a few bad checkpoints do not move it. NaN where its weights can't be used.
    cosine : float
        Median of the cosines between its weights and those of each other checkpoint, from the same
        numbers; near 1 for fine-tunings of one start, near 0 for networks that share none. NaN for
        a single checkpoint, and where its weights can't be used.
    score : float or None
        Known held-out score.
    same_as : str or None
        The first checkpoint with the same weights.
    problem : str or None
        Why it should be left out, if it should: it holds NaN or infinite values, can't be read,
        points elsewhere than the others or lies far from them.

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
    problem: str | None = None

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.4f}"
        note = f", {shortened(self._note)}" if self._note else ""
        return (
            f"CheckpointSummary({shortened(self.name)!r}, norm {_number(self.norm, '.4g')}, "
            f"distance {_number(self.distance, '.4g')}, cosine {_number(self.cosine, '.4f')}"
            f"{score}{note})"
        )

    @property
    def _note(self) -> str:
        """What is wrong with it, or which it repeats."""
        return self.problem or (f"same as {self.same_as}" if self.same_as else "")

    def _cells(self) -> tuple[str, ...]:
        return (
            self.name,
            _number(self.norm, ".4g"),
            _number(self.distance, ".4g"),
            _number(self.cosine, ".4f"),
            "-" if self.score is None else f"{self.score:.4f}",
            _short(self._note),
        )

    def _repr_html_(self) -> str:
        return notebook_html("Checkpoint", Table(HEADER, [self._cells()], LEFT).without_empty())


@dataclass(frozen=True, repr=False)
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
        Tensors whose bits are the same in all checkpoints: frozen parts, or all of them in copies.
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
            for number in ("norm", "distance", "cosine"):
                row[number] = row[number] if math.isfinite(row[number]) else None
        return plain

    def __str__(self) -> str:
        return "\n".join([self._table().to_text(), *self._notes()])

    def _table(self) -> Table:
        return Table(HEADER, [row._cells() for row in self.checkpoints], LEFT)

    def _notes(self) -> list[str]:
        """The lines below the table."""
        kinds = ", ".join(f"{n} of {dtype}" for dtype, n in self.dtypes.items())
        return [
            f"Each checkpoint has {self.n_parameters:,} floating-point numbers. Tensors: {kinds}; "
            f"{len(self.identical)} are the same in all checkpoints.",
            "distance: of the weights from the median of all checkpoints. cosine: between the "
            "weights and those of another checkpoint, median over the others; near 1 after "
            "fine-tuning from one start.",
            *self.verdict,
        ]

    def __repr__(self) -> str:
        n = len(self.checkpoints)
        verdict = shortened(self.verdict[-1], 100) if self.verdict else ""
        return f"CollectionSummary({n} checkpoint{'s' * (n != 1)}: {verdict})"

    def _repr_html_(self) -> str:
        n = len(self.checkpoints)
        heading = f"{n:,} checkpoint{'s' * (n != 1)}"
        return notebook_html(heading, self._table().without_empty(), self._notes())


def describe(collection: Openable) -> CollectionSummary:
    """Read all checkpoints once: norms, digests, and a few numbers of every tensor."""
    squares: dict[str, float] = defaultdict(float)
    digests: dict[str, dict[str, bytes]] = {name: {} for name in collection.names}

    def visit(name: str, tensor: str, value: torch.Tensor) -> None:
        digests[name][tensor] = hashlib.sha256(tensor_bytes(value)).digest()
        if value.is_floating_point():
            flat = value.double().flatten()
            square = float(torch.dot(flat, flat))
            squares[name] += square if math.isfinite(square) else 0.0  # of an infinite constant

    found = survey(collection, visit)
    names, layout = usable(collection, found), collection.layout
    relations = found.relations(names, layout, least=1)
    same = [t for t in layout if names and len({digests[name][t] for name in names}) == 1]
    first: dict[tuple[bytes, ...], str] = {}
    copied = {n: first.setdefault(tuple(digests[n].values()), n) for n in names}
    problems, unrelated = found.problems, relations.unrelated
    at = {name: k for k, name in enumerate(relations.names)}
    summaries = tuple(
        CheckpointSummary(
            name,
            norm=math.sqrt(squares[name]) if name in copied else math.nan,
            distance=float(relations.distances[at[name]]) if name in at else math.nan,
            cosine=float(relations.cosines[at[name]]) if name in at else math.nan,
            score=None if collection.scores is None else collection.scores[name],
            same_as=None if copied.get(name, name) == name else copied[name],
            problem=problems.get(name) or unrelated.get(name),
        )
        for name in collection.names
    )
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in layout.values())
    return CollectionSummary(
        summaries,
        sum(info.size for info in layout.values() if info.is_floating),
        dict(dtypes),
        tuple(same),
        (
            *_unusable(problems),
            *_soups(collection),
            *_verdict([s for s in summaries if s.name in copied], relations, same, layout),
            *_new_heads(found, names, relations),
        ),
    )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _short(text: str) -> str:
    """One line of a table; the verdict has the whole."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unusable(problems: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence on each checkpoint that can't be used; five at most."""
    if not problems:
        return ()
    said = [f"{name!r} can't be used: {why.rstrip('.')}." for name, why in problems.items()]
    rest = [f"{listed(list(problems)[5:])} can't be used either."] if len(said) > 5 else []
    which = "it" if len(problems) == 1 else "them"
    what = remedy(list(problems)).replace("leave out", f"Leave {which} out")
    return (*said[:5], *rest, f"{what}.")


def _soups(collection: Openable) -> tuple[str, ...]:
    said = judge_soups(collection.soups(), len(collection.names))
    return (said,) if said else ()


def _new_heads(found: Survey, names: Sequence[str], relations: Relations) -> tuple[str, ...]:
    """A remark if a few matrices of related checkpoints have little in common, such as a head."""
    cosines = found.matrix_cosines(names)
    low = [tensor for tensor, cosine in cosines.items() if cosine < UNRELATED]
    if relations.unrelated or not low or 2 * len(low) > len(cosines):
        return ()
    more = f" and {len(low) - 1} more" if len(low) > 1 else ""
    return (
        f"But the values of {low[0]!r}{more} have little in common (mean cosine "
        f"{cosines[low[0]]:.2f}): if "
        f"each run began with a random head of its own, the runs do not mix. Save one start with "
        f"its head, and begin every run from it.",
    )


def _verdict(
    summaries: Sequence[CheckpointSummary],
    relations: Relations,
    identical: Sequence[str],
    tensors: Mapping[str, Any],
) -> tuple[str, ...]:
    if not summaries:
        return ("No checkpoint is left: nothing to mix.",)
    if len(summaries) == 1:
        return ("One checkpoint: nothing to mix.",)
    copies = [row.name for row in summaries if row.same_as]
    if len(copies) == len(summaries) - 1:
        return ("All checkpoints are the same: a soup of them is that checkpoint.",)
    verdict = []
    if copies:
        verdict.append(
            f"{listed(copies)} {'repeats' if len(copies) == 1 else 'repeat'} other checkpoints: "
            f"in a mean, equal ones count each time."
        )
    if identical:
        verdict.append(
            f"{len(identical)} of {len(tensors)} tensors are the same in all checkpoints, and so "
            f"in every soup (frozen parts, or counters): they cost nothing to search."
        )
    if any(name.endswith(".running_var") for name in tensors):
        verdict.append(
            "The network has BatchNorm: batch_norm='recalibrate' can give a better soup, so try "
            "both."
        )
    return (*verdict, judge(relations))
