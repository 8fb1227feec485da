"""Compare the config.json of Hugging Face folders where shapes of tensors show no difference."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError, SoupWarning
from .hub import hub_folder
from .hub_config import LIMIT, output_labels
from .low_rank import LowRankCheckpoint
from .protocol import Entry
from .texts import read_text

# how many heads the weights are cut into, which their shapes do not show
HEADS = re.compile(r"(num|n|encoder|decoder)_(attention_|key_value_)?heads?")
# other settings of the network; they are plain values that no version of transformers rewrites
NOTABLE = re.compile(
    r"^(?!.*drop).*((^|_)act($|_)|activation|eps($|ilon)|rope_theta|rotary|position_embedding_type|stride|"
    r"dilation|patch_size|is_decoder|pool|causal|experts_per_tok|residual)"
)

NAMES = 2  # of the objects around a field, for messages


def check_configs(entries: Iterable[Entry]) -> None:
    """Compare the configs of Hugging Face folders, each field with the first config that has it.

    Raise an error if the labels have another order or the number of heads differs, and warn of
    other settings of the network. A field that a config lacks is ignored, since versions of
    transformers write different ones.
    """
    first: Path | None = None
    known = _Known()
    seen: set[bytes] = set()  # digests of the texts: most are equal
    odd: dict[str, str] = {}  # field -> what differs
    for folder in dict.fromkeys(_folders(entries)):
        path = folder / "config.json"
        text = _text(path)
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if (config := _parsed(text)) is None:
            continue
        first = first or path
        for field, found in _compare(path, config, known).items():
            odd.setdefault(field, found)
    if odd:
        warnings.warn(
            f"The config.json of Hugging Face folders differ: {'; '.join(list(odd.values())[:5])}"
            + (f"; and {len(odd) - 5} more fields" if len(odd) > 5 else "")
            + f". The network is built from {str(first)!r}. If a field changes what the "
            f"network computes, leave those checkpoints out.",
            SoupWarning,
            stacklevel=3,
        )


def _folders(entries: Iterable[Entry]) -> Iterable[Path]:
    for entry in entries:
        path = entry.checkpoint.path
        if path is not None and not isinstance(entry.checkpoint, LowRankCheckpoint):
            folder = hub_folder(path)
            if folder is not None:
                yield folder


def _text(path: Path) -> str:
    """The text of a config; empty if it can't be read, which is an error where it is needed."""
    try:
        return read_text(path, LIMIT)
    except CheckpointError:
        return ""


def _parsed(text: str) -> dict[str, Any] | None:
    """A config of transformers, which names a type of model; others belong to the user."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_hub = isinstance(config, dict) and isinstance(config.get("model_type"), str)
    return config if is_hub else None


class _Known:
    """What the configs that were compared say, each with the first file that says it."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}  # as in a config, with (value, file)
        self.labels: dict[tuple[str, ...], tuple[tuple[str, ...], Path]] = {}  # by them, sorted


def _compare(path: Path, config: dict[str, Any], known: _Known) -> dict[str, str]:
    """What differs and may matter, by field; raise an error for what does matter."""
    odd = _compare_labels(path, config, known)
    for field, got, other, first in _differences(path, config, known):
        name = _short(".".join(field))
        if HEADS.fullmatch(field[-1]):
            raise CheckpointError(
                f"{str(path)!r} describes another network than {str(first)!r}: {name} is "
                f"{_short(got)}, expected {_short(other)}. The weights have equal shapes, but the "
                f"network uses them differently, so they can't be mixed. Leave one of the two out, "
                f"or correct the file if the network was trained with the other value."
            )
        odd[name] = f"{name} is {_short(got)} in {str(path)!r}, {_short(other)} in {str(first)!r}"
    return odd


def _compare_labels(path: Path, config: dict[str, Any], known: _Known) -> dict[str, str]:
    """Other names of the outputs; raise an error for the same names in another order."""
    labels = output_labels(config.get("id2label"))
    if not labels:
        return {}
    wanted, first = known.labels.setdefault(tuple(sorted(labels)), (labels, path))
    if (place := _first_difference(labels, wanted)) is not None:
        raise CheckpointError(
            f"{str(path)!r} has the labels of {str(first)!r} in another order ('id2label'): output "
            f"{place} is {_short(labels[place])}, expected {_short(wanted[place])}. Their outputs "
            f"mean different classes, so the weights can't be mixed. Fine-tune with one order of "
            f"the labels, such as a sorted list, or leave one of the two out."
        )
    wanted, first = next(iter(known.labels.values()))
    if (place := _first_difference(labels, wanted)) is None:  # one may have more labels
        return {}
    got, other = _short(labels[place]), _short(wanted[place])
    return {"": f"output {place} is {got} in {str(path)!r}, {other} in {str(first)!r}"}


def _first_difference(a: tuple[str, ...], b: tuple[str, ...]) -> int | None:
    return next((k for k, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), None)


def _differences(
    path: Path, config: dict[str, Any], known: _Known
) -> Iterable[tuple[tuple[str, ...], Any, Any, Path]]:
    """Fields that matter and differ, by their last names in nested configs; adds new ones.

    Versions of transformers write an unused value as null, a list as text, and the same function as
    "gelu" or "gelu_pytorch_tanh".
    """
    todo: list[tuple[tuple[str, ...], Any, Any]] = [((), config, known.fields)]
    while todo:
        outer, config, fields = todo.pop()
        for name, got in config.items():
            field, is_part = (*outer, name), isinstance(got, dict)
            if not is_part and not (_kind(got) and (HEADS.fullmatch(name) or NOTABLE.search(name))):
                continue
            other = fields.setdefault(name, {} if is_part else (got, path))
            if is_part and isinstance(other, dict):
                todo.append((field[-NAMES:], got, other))
            elif not is_part and isinstance(other, tuple):
                value, first = other
                if got != value and _kind(got) == _kind(value) and not _are_gelus(got, value):
                    yield field, got, value, first


def _kind(value: Any) -> str:
    """Text, number, flag or list (one value per stage); empty for others."""
    kinds = {bool: "flag", int: "number", float: "number", str: "text", list: "list"}
    return kinds.get(type(value), "")


def _are_gelus(*names: Any) -> bool:
    return all(isinstance(name, str) and name.startswith("gelu") for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
