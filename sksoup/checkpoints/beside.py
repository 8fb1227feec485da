"""What lies beside weights in a folder, and what other programs would load of it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from ..exceptions import CheckpointError
from .folders import ADAPTER_WEIGHTS, FOLDER_WEIGHTS, NOT_WEIGHTS, weights_of
from .hub_config import LIMIT, refuse_other_weights
from .peft_config import CONFIG
from .shards import INDEX, weight_map
from .texts import read_text

MODULES = "modules.json"  # of sentence-transformers: the network, and what follows it


def refuse_what_others_load(path: Path) -> list[str]:
    """Refuse weights that other programs would not load from this place, or not alone.

    A folder is what ``from_pretrained`` is given, and so is the folder of a file that has the name
    of its weights, where a configuration is beside it. Returns the weights of further modules that
    sentence-transformers loads beside those, by name.
    """
    folder = path if path.is_dir() else path.parent
    is_adapter = (folder / CONFIG).is_file()
    is_model = (folder / "config.json").is_file()
    names = [*FOLDER_WEIGHTS, *ADAPTER_WEIGHTS]
    if not path.is_dir() and not (path.name in names and (is_adapter or is_model)):
        return []
    refuse_other_weights(folder)
    if is_adapter:
        raise CheckpointError(
            f"{str(path)!r} lies beside {CONFIG!r}: PEFT and transformers take the folder for an "
            f"adapter, and add it to a base. A soup is verified in a file or folder of its own."
        )
    file = weights_of(path) if path.is_dir() else path
    opened = {file.name}
    if file.name.endswith(INDEX):
        opened |= set(weight_map(file).values())
    if other := next((name for name in _weights_in(folder) if name not in opened), None):
        raise CheckpointError(
            f"{str(folder / other)!r} lies beside {file.name!r}: other programs may load it "
            f"instead, or too. Move it out of the folder."
        )
    return _further_modules(folder)


def _weights_in(folder: Path) -> list[str]:
    """Names of the files that loaders of Hugging Face may take for weights."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not NOT_WEIGHTS.fullmatch(path.name)
        and (
            path.suffix == ".safetensors"
            or path.name.endswith(INDEX)
            or (path.name.startswith("pytorch_model") and path.suffix == ".bin")
        )
    )


def _further_modules(folder: Path) -> list[str]:
    """Weights in the folders that modules.json names; an error if the network is none of them."""
    if not (folder / MODULES).is_file():
        return []
    try:
        modules = json.loads(read_text(folder / MODULES, LIMIT))
        places = [one["path"] for one in modules]
    except (ValueError, RecursionError, TypeError, KeyError):  # others can't read it either
        return []
    if "" not in places:
        raise CheckpointError(
            f"{str(folder / MODULES)!r} names no module in its own folder: sentence-transformers "
            f"would load other weights than those there."
        )
    return [name for place in places if place for name in _weights_below(folder, place)]


def _weights_below(folder: Path, place: object) -> Collection[str]:
    suffixes = (".safetensors", ".bin", ".pt")
    here = folder / str(place)
    if not here.is_dir():
        return []
    return sorted(f"{place}/{one.name}" for one in here.iterdir() if one.suffix in suffixes)
