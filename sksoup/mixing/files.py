"""Store recipes in the metadata of a soup's file, next to it, or in a file of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.folders import find_weights, read_metadata
from ..checkpoints.read import RECIPE_KEY, RECIPE_SUFFIX, TORCH_SUFFIXES, real_path
from ..checkpoints.shards import INDEX
from ..checkpoints.sources import paths_of
from ..checkpoints.texts import read_text
from ..checkpoints.write import write_safetensors, write_torch
from ..exceptions import CheckpointError, RecipeError
from .card import is_card
from .document import MOST_BYTES, check_header
from .verification import digest_of_tensors

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def check_suffix(path: Path) -> None:
    """Raise an error for a file name with an unsupported suffix."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{str(path)!r} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got "
            f"{path.suffix!r}."
        )


def refuse_inputs(output: Path, checkpoints: CheckpointCollection, names: Iterable[str]) -> None:
    """Refuse an output that is the file, or in the folder, of a checkpoint or an adapter's base."""
    paths = paths_of(checkpoints, names)
    weights = (find_weights(path) if path.is_dir() else path for path in paths)  # may be links
    inputs = {Path(real_path(path)) for path in (*paths, *filter(None, weights))}
    inputs |= {Path(real_path(path.parent)) for path in paths if path.name.endswith(INDEX)}
    real = Path(real_path(output))  # also of a link to itself
    if {real, real.parent} & inputs:
        raise FileExistsError(
            f"{str(output)!r} is one of the checkpoints to be mixed, or part of one. Give another "
            f"name, or move it away first."
        )


def refuse_other_text(card: Path) -> None:
    """Refuse to replace a text that is not a model card of a soup."""
    if not os.path.lexists(card):
        return
    try:
        text = read_text(card, MOST_BYTES)
    except CheckpointError:
        text = ""
    if not is_card(text):
        raise FileExistsError(
            f"{str(card)!r} exists and is not a model card of a soup, so it is not replaced. Move "
            f"it away, give the soup another name, or pass card=False."
        )


def beside(path: Path) -> Path:
    """The recipe file of a file without metadata: soup.pt -> soup.recipe.json."""
    return path.with_suffix(RECIPE_SUFFIX)


def _refuse_other_recipe(path: Path) -> None:
    """Refuse a recipe that would belong to another file, too, and one that is no recipe."""
    recipe = beside(path)
    others = [other for s in TORCH_SUFFIXES if (other := path.with_suffix(s)) != path]
    if owner := next(filter(os.path.lexists, others), None):
        raise FileExistsError(
            f"{str(recipe)!r}, in which the recipe of {path.name!r} is written, would be that of "
            f"{owner.name!r}, too. Give the soup another name, or save it as .safetensors."
        )
    if not recipe.is_file():
        return
    try:
        document = json.loads(read_text(recipe, MOST_BYTES))
    except (CheckpointError, ValueError, RecursionError):
        document = None
    is_recipe = isinstance(document, dict) and "ingredients" in document
    if not is_recipe:
        raise FileExistsError(
            f"{str(recipe)!r} exists and is no recipe of sksoup, so it is not replaced. Give the "
            f"soup another name, save it as .safetensors, or move that file away."
        )


def write_soup(
    path: Path,
    recipe: Any,
    weights: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, and the recipe with their SHA-256 in the same file or next to it.

    ``stored`` are the weights by the names that readers of the file expect.
    """
    check_suffix(path)
    text = replace(recipe, weights_sha256=digest_of_tensors(weights)).to_json()
    written = weights if stored is None else stored
    if path.suffix == ".safetensors":
        check_header(text, written)
        write_safetensors(path, written, {RECIPE_KEY: text, "format": "pt"})
    else:
        _refuse_other_recipe(path)
        write_torch(path, written, beside(path), text)


def read_recipe(path: Path) -> str:
    """The text of the recipe in a soup's file or folder, or in a .json file."""
    if path.suffix in TORCH_SUFFIXES and not path.is_dir():
        if not beside(path).is_file():
            raise RecipeError(
                f"{str(path)!r} has no sksoup recipe: there is no {beside(path).name!r} next to "
                f"it, which soup.save writes. Keep the two files together."
            )
        return read_text(beside(path), MOST_BYTES)
    if path.suffix == ".safetensors" or path.name.endswith(INDEX) or path.is_dir():
        if (found := read_metadata(path).get(RECIPE_KEY)) is not None:
            return found
        raise RecipeError(
            f"{str(path)!r} holds weights but no sksoup recipe. Only files written by soup.save "
            f"contain one."
        )
    try:
        return read_text(path, MOST_BYTES)
    except CheckpointError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        raise RecipeError(
            f"{str(path)!r} holds no sksoup recipe: expected a .safetensors file or a folder that "
            f"sksoup wrote, a .pt or .ckpt file with its .recipe.json, or a .json file."
        ) from error
