"""Recognize folders: a Hugging Face or skorch checkpoint, or a folder of checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from ..exceptions import CheckpointError
from .peft_config import CONFIG
from .read import place_of, read_safetensors_metadata, real_path, suffix_of
from .shards import INDEX, weight_map

# file names of weights in Hugging Face and skorch folders, in order of preference
FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "params.safetensors",
    "params.pt",
)
STEP = re.compile(r"checkpoint-(\d+)")  # a folder written by transformers' Trainer
TRAINER_STATE = "trainer_state.json"  # in it
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's names
# files that training loops write next to the weights
NOT_WEIGHTS = re.compile(
    r"(train_end_)?(training_args|optimizer|scheduler|criterion|scaler|rng_state|sampler|dl_state_dict)"
    r"(_\d+)?\.(bin|pt|pth|safetensors)"
)

OF_SKORCH = re.compile(r"(.+)(?:optimizer|criterion)([^/]*\.(?:pt|safetensors))")


def find_weights(folder: Path) -> Path | None:
    """Return the weights file of a Hugging Face, PEFT or skorch folder, or None for others."""
    found = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if (folder / CONFIG).is_file():
        return _adapter_weights(folder, found)
    marks = ("config.json", "history.json", *(name for name in FOLDER_WEIGHTS if INDEX in name))
    if STEP.fullmatch(folder.name):  # networks that are not of transformers have no config.json
        marks += (TRAINER_STATE,)
    is_skorch = found is not None and found.stem == "params"
    return found if is_skorch or any((folder / mark).is_file() for mark in marks) else None


def _adapter_weights(folder: Path, whole: Path | None) -> Path:
    """The weights in a PEFT folder."""
    found = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if found is None or whole is not None:
        held = f"{whole.name!r}, too" if whole is not None else "no weights"
        raise CheckpointError(
            f"{str(folder)!r} holds {CONFIG!r} of a PEFT adapter and {held}, expected one of "
            f"{', '.join(ADAPTER_WEIGHTS)} next to it, and no whole model. Keep the one that you "
            f"mean."
        )
    return found


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The weights files in a folder, without hidden ones; shards once, by their index."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    indices = [path for path in paths if path.name.endswith(INDEX)]
    once = {place_of(index): index for index in indices}.values()  # there may be links
    shards = {folder / name for index in once for name in set(weight_map(index).values())}
    files = [path for path in paths if is_weights(path, suffixes) and path not in shards]
    # skorch's Checkpoint(fn_prefix=...) writes others beside the params
    params = [path.name.partition("params") for path in files if "params" in path.name]
    names = {(first, end) for first, _, rest in params for end in (rest, ".pt", ".safetensors")}
    found = ((path, OF_SKORCH.fullmatch(path.name)) for path in files)
    return [*(path for path, other in found if not other or other.groups() not in names), *indices]


def place_of_checkpoint(path: str | os.PathLike[str]) -> tuple[str, str]:
    """What is the same for all paths to one checkpoint; an index is read with the shards beside it.

    In stores that keep equal files once, the indices of several checkpoints may be one file.
    """
    folder, name = os.path.split(path)
    return real_path(path), real_path(folder) if name.endswith(INDEX) else ""


def is_weights(path: Path, suffixes: Collection[str]) -> bool:
    """Whether a path may be a weights file, and not another file of a training loop."""
    if suffix_of(path) not in suffixes or not path.is_file():
        return False
    return not NOT_WEIGHTS.fullmatch(path.name.lower().removesuffix(".tar"))


def weights_of(folder: Path) -> Path:
    """The weights in a Hugging Face or skorch folder; raise an error for other folders."""
    found = find_weights(folder)
    if found is None:
        raise CheckpointError(
            f"{str(folder)!r} is a folder without weights that sksoup can read, expected "
            f"{', '.join(FOLDER_WEIGHTS)} next to a config.json, or skorch's params.pt. For a "
            f"folder of checkpoints use CheckpointCollection.from_path."
        )
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file, or of the first shard of an index or a folder."""
    path = weights_of(path) if path.is_dir() else path
    if path.name.endswith(INDEX):
        path = path.parent / min(weight_map(path).values())
    return read_safetensors_metadata(path)
