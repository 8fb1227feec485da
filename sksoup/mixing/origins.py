"""Base model, license and task of a soup, from the Hugging Face folders of its ingredients."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..checkpoints.folders import STEP
from ..checkpoints.hub_config import output_labels
from ..checkpoints.read import RealFile
from ..checkpoints.texts import read_text
from ..exceptions import CheckpointError

MOST_BYTES = 2**23
NOTHING: tuple[Any, str | None, tuple[str, ...]] = (None, None, ())  # of a config that says nothing
# an identifier on the hub: name or organization/name, not a path
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")
FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
TASKS = {  # how names of architectures end -> what the hub calls the task
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
}


@dataclass(frozen=True)
class Origin:
    """Values on which all ingredients agree; others are None or empty."""

    base_model: str | None = None
    licence: str | None = None
    architecture: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def task(self) -> str | None:
        """The hub's name of the task."""
        name = self.architecture or ""
        return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def common_origin(folders: Iterable[Path | None]) -> Origin:
    """Values on which configs and cards of all folders agree; none if a folder is missing."""
    different = dict.fromkeys(folders)  # files in one folder share its config
    found = [Origin() if folder is None else _origin(folder) for folder in different]
    first = found[0] if found else Origin()

    def agreed(name: str, otherwise: Any) -> Any:
        value = getattr(first, name)
        return value if all(getattr(one, name) == value for one in found) else otherwise

    return Origin(
        agreed("base_model", None), agreed("licence", None),
        agreed("architecture", None), agreed("labels", ()),
    )  # fmt: skip


def _origin(folder: Path) -> Origin:
    path = folder / "config.json"
    name_or_path, architecture, labels = (
        _described(RealFile.at(path)) if path.is_file() else NOTHING
    )
    card = _of_card(folder / "README.md")
    if card is None and STEP.fullmatch(folder.name):  # Trainer writes one card per run
        card = _of_card(folder.parent / "README.md")
    base_model, licence = card or ("", "")
    named = base_model or name_or_path
    return Origin(
        named if _is_hub_id(named) else None,
        licence if licence != "other" and LICENCE.fullmatch(licence) else None,
        architecture,
        labels,
    )


@lru_cache(maxsize=100)  # many folders may share one config.json
def _described(file: RealFile) -> tuple[Any, str | None, tuple[str, ...]]:
    """The name or path of the base, the class and the labels in a config."""
    try:
        config = json.loads(_text(file.path))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return NOTHING
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    is_name = isinstance(name, str) and name.isidentifier()
    labels = output_labels(config.get("id2label"))
    return config.get("_name_or_path"), name if is_name else None, labels


def _of_card(path: Path) -> tuple[str, str] | None:
    """The base and the license in a card; None if there is no card."""
    return _entries(RealFile.at(path)) if path.is_file() else None


@lru_cache(maxsize=100)  # all checkpoints of a run share its card
def _entries(file: RealFile) -> tuple[str, str] | None:
    card = _text(file.path)
    return (_entry(card, "base_model"), _entry(card, "license")) if card else None


def _text(path: Path) -> str:
    """A small text, or an empty one; an unreadable card is not an error."""
    try:
        return read_text(path, MOST_BYTES) if path.is_file() else ""
    except CheckpointError:
        return ""


def _entry(card: str, name: str) -> str:
    """A plain value in the front matter of a card."""
    front = FRONT.match(card)
    value = rf"(?m)^{name}:[ \t]*(?:\n-[ \t]+)?(\S+)[ \t]*\r?$(?!\n-)"  # or a list of one
    found = re.search(value, front[1] if front else "")
    return found[1].strip("\"'") if found else ""


def _is_hub_id(name: Any) -> bool:
    """Whether a name is that of a model on the hub and not of a folder."""
    return (
        isinstance(name, str)
        and HUB_ID.fullmatch(name) is not None
        and ".." not in name
        and not STEP.fullmatch(name.rpartition("/")[2])
        and not Path(name).exists()
    )
