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

# fields that do not change the outputs in eval mode: names, training, generation
HARMLESS = re.compile(
    r"name|version|dtype|commit|use_cache|implementation|drop|label2id|id2label|problem_type|"
    r"^output_|return_dict|torchscript|gradient_checkpointing|^task|_task$|task_specific|"
    r"^(bos|eos|sep|cls|mask|unk)_token_id|init|_std$|^mask_|spec_augment|loss|coef|smoothing|"
    r"freeze|^ctc_|penalty|beam|^(max|min)_length|temperature|^top_[kp]$|typical_p|ngram|"
    r"early_stopping|do_sample|words_ids|suppress|^forced_|return_sequences|chunk_size_feed|"
    r"^prefix$|tokenizer|length_decay"
)
# fields that change the outputs
DECISIVE = re.compile(
    r"head|(^|_)act($|_)|activation|eps($|ilon)|rope|rotary|(?<!max_)position|scal|window|stride|"
    r"dilation|patch|norm|is_decoder|cross_attention|pool|causal|bidirectional|group|per_tok|"
    r"residual|gate|kernel"
)


def check_configs(entries: Iterable[Entry]) -> None:
    """Compare the configs of Hugging Face folders with that of the first one.

    Raise an error if the labels have another order or a setting of the network differs, and warn of
    other differences. A field that only one of two configs has is ignored, since versions of
    transformers write different ones.
    """
    first: tuple[Path, dict[str, Any]] | None = None
    seen: set[bytes] = set()  # digests of the texts: most are equal
    odd: dict[str, str] = {}  # field -> what differs
    for folder in dict.fromkeys(_folders(entries)):
        path = folder / "config.json"
        text = _text(path)
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or (config := _parsed(text)) is None:
            continue
        seen.add(digest)
        if first is None:
            first = path, config
            continue
        for field, found in _compare(path, config, *first).items():
            odd.setdefault(field, found)
    if odd and first is not None:
        warnings.warn(
            f"The config.json of Hugging Face folders differ: {'; '.join(list(odd.values())[:5])}"
            + (f"; and {len(odd) - 5} more fields" if len(odd) > 5 else "")
            + f". The network is built from {str(first[0])!r}. If a field changes what the "
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
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _compare(
    path: Path, config: dict[str, Any], first: Path, expected: dict[str, Any]
) -> dict[str, str]:
    """What differs and may matter, by field; raise an error for what does matter."""
    odd = _compare_labels(path, config, first, expected)
    for field, got, other in _differences(config, expected):
        if any(map(HARMLESS.search, field)):
            continue
        name = _short(".".join(field))
        if any(map(DECISIVE.search, field)):
            raise CheckpointError(
                f"{str(path)!r} describes another network than {str(first)!r}: {name} is "
                f"{_short(got)}, expected {_short(other)}. The weights have equal shapes, but the "
                f"network uses them differently, so they can't be mixed. Leave one of the two out, "
                f"or correct the file if the network was trained with the other value."
            )
        odd[name] = f"{name} is {_short(got)} in {str(path)!r}, {_short(other)} in {str(first)!r}"
    return odd


def _compare_labels(
    path: Path, config: dict[str, Any], first: Path, expected: dict[str, Any]
) -> dict[str, str]:
    """Other names of the outputs; raise an error for the same names in another order."""
    labels, wanted = (output_labels(one.get("id2label")) for one in (config, expected))
    if not labels or not wanted or labels == wanted:
        return {}
    place = next((k for k, (a, b) in enumerate(zip(labels, wanted, strict=False)) if a != b), None)
    if place is None:  # one has more labels
        return {}
    got, other = _short(labels[place]), _short(wanted[place])
    if sorted(labels) == sorted(wanted):
        raise CheckpointError(
            f"{str(path)!r} has the labels of {str(first)!r} in another order ('id2label'): output "
            f"{place} is {got}, expected {other}. Their outputs mean different classes, so the "
            f"weights can't be mixed. Fine-tune with one order of the labels, such as a sorted "
            f"list, or leave one of the two out."
        )
    return {"": f"output {place} is {got} in {str(path)!r}, {other} in {str(first)!r}"}


def _differences(
    config: dict[str, Any], expected: dict[str, Any]
) -> Iterable[tuple[tuple[str, ...], Any, Any]]:
    """Fields in both that differ, as paths into nested configs."""
    todo: list[tuple[tuple[str, ...], Any, Any]] = [((), config, expected)]
    while todo:
        field, got, other = todo.pop()
        if isinstance(got, dict) and isinstance(other, dict):
            todo.extend(((*field, name), got[name], other[name]) for name in got if name in other)
        elif got != other:
            yield field, got, other


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
