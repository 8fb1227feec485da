"""Read all checkpoints, including bad ones, and find out which ones are bad."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

import torch

from ..exceptions import CheckpointError
from .health import Health
from .protocol import Read, TensorInfo
from .relations import UNRELATED, Relations

MORE = "See collection.describe() for details."


class Openable(Protocol):
    """The part of a collection that a survey needs."""

    names: tuple[str, ...]
    layout: dict[str, TensorInfo]
    scores: dict[str, float] | None
    health: Health

    def open(self, name: str) -> AbstractContextManager[Read]: ...

    def judged_by(self, health: Health) -> Self: ...

    def soups(self) -> list[str]: ...


class Survey(Health):
    """Health of checkpoints of which some may be bad: decided after all have been read."""

    def __init__(self, health: Health) -> None:
        self.__dict__.update(health.__dict__)  # shared, so that nothing is checked twice
        self.problems: dict[str, str] = {}  # checkpoint -> reason why it can't be used
        self._constants: dict[str, dict[str, bytes]] = defaultdict(dict)  # tensor -> checkpoint

    def see(self, name: str, tensor: str, value: torch.Tensor) -> None:
        """Record what a tensor contains, without raising an error."""
        if tensor in self._samples.get(name, ()):
            return  # already known to be finite
        largest = self._look(name, tensor, value)
        if math.isnan(largest):
            self.problems.setdefault(name, f"{tensor!r} holds NaN")
        elif math.isinf(largest):
            # adding 0 turns -0 into 0, so that the bits are equal
            self._constants[tensor][name] = (value.double() + 0).numpy().tobytes()
        else:
            self._finite.setdefault(tensor, set()).add(name)

    def judge_infinities(self, names: Sequence[str]) -> None:
        """Infinite values are allowed if most checkpoints have them; the others are bad."""
        left = [name for name in names if name not in self.problems]
        for tensor, values in self._constants.items():
            held = {name: values[name] for name in left if name in values}
            constant, n = Counter(held.values()).most_common(1)[0] if held else (b"", 0)
            is_constant = 2 * n > len(left)
            for name in left:
                if name in held and not (is_constant and held[name] == constant):
                    self.problems.setdefault(name, f"{tensor!r} holds infinite values")
                elif name not in held and is_constant:
                    wrong = f"{tensor!r} is finite, but infinite in most others"
                    self.problems.setdefault(name, wrong)


def survey(
    collection: Openable, visit: Callable[[str, str, torch.Tensor], None] | None = None
) -> Survey:
    """Read every checkpoint once, and call ``visit(name, tensor, value)`` for every tensor."""
    found = Survey(collection.health)
    reading = collection.judged_by(found)
    for name in collection.names:
        try:
            with reading.open(name) as read:
                for tensor in collection.layout:
                    value = read(tensor)
                    if visit is not None:
                        visit(name, tensor, value)
        except (CheckpointError, OSError) as error:
            found.problems.setdefault(name, str(error))
    found.judge_infinities(collection.names)
    return found


def usable(collection: Openable, found: Survey) -> list[str]:
    """Names of the checkpoints that could be read and are finite."""
    return [name for name in collection.names if name not in found.problems]


def judge(relations: Relations) -> str:
    """A verdict on whether the checkpoints can be mixed."""
    elsewhere, far = list(relations.elsewhere), list(relations.far)
    only_far = [name for name in far if name not in relations.elsewhere]
    bad, n = list(relations.unrelated), len(relations.names)
    if not bad:
        return "The checkpoints are close together, as expected after fine-tuning: good to mix."
    if 2 * len(bad) >= n:
        parts = []
        if elsewhere:
            parts.append(
                f"{len(elsewhere)} of {n} differ in direction from the others (median cosine below "
                f"{UNRELATED})"
            )
        if only_far:
            parts.append(
                f"{len(only_far)} of {n} are far from the others ({relations.far[only_far[0]]})"
            )
        return (
            f"These checkpoints were not fine-tuned from the same weights, or with learning rates "
            f"that are too high: {' and '.join(parts)}. A soup of them will not work. Fine-tune "
            f"all of them from the same saved start, with lower learning rates."
        )
    parts = []
    if elsewhere:
        measured = relations.elsewhere[elsewhere[0]]
        if elsewhere[0] in relations.far:
            measured += f"; {relations.far[elsewhere[0]]}"
        parts.append(
            f"{listed(elsewhere)} {'was' if len(elsewhere) == 1 else 'were'} not fine-tuned from "
            f"the same weights as the others, or diverged ({_of(elsewhere)}{measured})"
        )
    if only_far:
        parts.append(
            f"{listed(only_far)} {'is' if len(only_far) == 1 else 'are'} far from the others and "
            f"probably diverged ({_of(only_far)}{relations.far[only_far[0]]})"
        )
    return f"{'; '.join(parts)}: {remedy(bad)}."


def judge_soups(names: Sequence[str], n: int) -> str:
    """A remark on soups among the checkpoints; empty if there are none, or only soups."""
    if not names or len(names) == n:
        return ""
    what = "is a soup" if len(names) == 1 else "are soups"
    return (
        f"{listed(names)} {what} that sksoup wrote, among checkpoints that may be its "
        f"ingredients: these would count twice, and its validation score is optimistic. Leave "
        f"soups out with collection.drop([...]), and keep them in another folder."
    )


def remedy(names: Sequence[str]) -> str:
    """How to leave out bad checkpoints."""
    which, it = (repr(names[0]), "it") if len(names) == 1 else ("[...]", "them")
    return f"leave {it} out with collection.drop({which}) or collection.healthy()"


def listed(names: Sequence[str]) -> str:
    """At most five names, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def reasons(problems: Mapping[str, str]) -> str:
    """At most five checkpoints, each with its problem."""
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(f"{name!r} ({why})" for name, why in list(problems.items())[:5]) + more


def _of(names: Sequence[str]) -> str:
    return f"{names[0]!r}: " if len(names) > 1 else ""
