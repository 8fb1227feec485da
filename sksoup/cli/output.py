"""What a command writes: a file, or a folder that appears once all of it is written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.architecture import skeleton
from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.converted import stored_names
from ..checkpoints.hub_companions import (
    copy_companions,
    copy_tokenizer,
    find_companions,
    find_tokenizer,
    model_folders,
    record_dtype,
)
from ..checkpoints.sources import SUFFIXES
from ..checkpoints.write import SHARD_BYTES, new_folder, write_text
from ..exceptions import CheckpointError
from ..mixing.card import model_card
from ..mixing.files import refuse_inputs
from ..mixing.ingredients import used_names
from ..mixing.recipe import Recipe
from ..runtime.memory import parse_bytes


def check_output(options: argparse.Namespace) -> None:
    """Refuse, before any work, what could not be written at its end."""
    output = Path(options.output)
    is_file = output.suffix == ".safetensors"
    if getattr(options, "shard_size", None) is not None:
        parse_bytes(options.shard_size, "--shard-size")
        if is_file:
            raise ValueError(
                f"--shard-size is for a folder, got the file {options.output!r}. Give -o a name "
                f"without .safetensors."
            )
    if is_file:
        if output.is_dir():
            raise FileExistsError(f"{str(output)!r} is a folder. Give another name.")
        if os.path.lexists(output) and not options.force:  # also a link to nothing
            raise FileExistsError(f"{str(output)!r} exists. Give another name, or --force.")
    elif output.suffix.lower() in (*SUFFIXES, ".json"):  # other dots are those of a folder's name
        raise CheckpointError(
            f"{str(output)!r} can't be written: got the suffix {output.suffix!r}, expected "
            f".safetensors, or a folder."
        )
    elif os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{str(output)!r} exists and is not an empty folder. Give another name, or move it "
            f"away: --force replaces files only."
        )
    if not (folder := output.absolute().parent).is_dir():
        raise FileNotFoundError(
            f"{str(output)!r} can't be written: the folder {str(output.parent)!r} does not exist."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{str(output)!r} can't be written: the folder {str(folder)!r} is read-only, or not "
            f"yours to write to. Give another folder."
        )


def check_companions(
    output: Path, collection: CheckpointCollection, tokenizer: Path | None
) -> None:
    """Refuse, before a fit, a tokenizer that can't be copied to the folder of its soup.

    And model folders of which no two could give that folder.
    """
    folders = model_folders(collection, collection.names)
    if output.suffix == ".safetensors" or not folders:
        return
    if tokenizer is not None:
        find_tokenizer(tokenizer.resolve())
    errors = []
    pairs: list[Sequence[Path]] = [*pairwise(folders)]
    for first, *others in pairs or [folders]:
        try:
            find_companions(first.resolve(), others)
            return
        except CheckpointError as error:
            errors.append(error)
    raise errors[0]


def check_not_input(output: Path, recipe: Recipe, collection: CheckpointCollection) -> None:
    """Refuse to replace a checkpoint that is mixed."""
    mixed = [one.name for one in recipe.ingredients if one.name in collection]
    used = used_names(recipe.ingredients, recipe.is_used(), collection)  # maybe under other names
    refuse_inputs(output, collection, {*mixed, *used.values()})


def write_mix(options: argparse.Namespace, recipe: Recipe, collection: CheckpointCollection) -> str:
    """Mix by a recipe and write it to the output; a remark on what was written."""
    output = Path(options.output)
    check_not_input(output, recipe, collection)
    if output.suffix == ".safetensors":
        replace(recipe, recalibrated=()).save_weights(output, recipe.cook(collection))
        return ""
    return write_folder(output, recipe, collection, options.shard_size or SHARD_BYTES)


def write_folder(
    output: Path, recipe: Recipe, collection: CheckpointCollection, shard_size: int | str
) -> str:
    """Write shards; from Hugging Face folders with their configuration, tokenizer and a card."""
    used = used_names(recipe.ingredients, recipe.is_used(), collection).values()
    listed = [one.name for one in recipe.ingredients if one.name in collection]
    sources = model_folders(collection, used, listed)
    if not sources or collection.adapters(collection.names):
        recipe.cook(collection, output, shard_size)
        return ""
    module = skeleton(collection.module)
    shapes = {n: torch.empty(i.shape, device="meta") for n, i in collection.layout.items()}
    if module is not None and stored_names(module, shapes).keys() != shapes.keys():
        recipe.cook(collection, output, shard_size)
        return (
            "; without config.json, as transformers has other names for these tensors in files: "
            "load them by load_state_dict, or use save_pretrained in Python"
        )
    with new_folder(output) as temporary:
        copy_companions(sources[0], temporary, sources[1:])  # first, as it may refuse them
        # a hidden name, which no module has
        move_up(recipe.cook(collection, temporary / ".weights", shard_size))
        record_dtype(temporary)
        write_text(temporary / "README.md", model_card(recipe, collection))
    return ""


def write_soup(output: Path, soup: Any, tokenizer: Path | None) -> None:
    """Write a fitted soup, with the tokenizer (its folder) that its texts were read by."""
    collection: CheckpointCollection = soup.checkpoints_
    if output.suffix == ".safetensors":
        soup.save(output)
    elif collection.adapters(collection.names) or model_folders(collection, collection.names):
        with new_folder(output) as temporary:
            soup.save_pretrained(temporary / "soup")
            if tokenizer is not None:
                copy_tokenizer(tokenizer, temporary / "soup")
            move_up(temporary / "soup")
    else:
        soup.recipe_.cook(collection, output)


def move_up(folder: Path) -> None:
    """Move what a folder holds into the folder that it is in, and remove it."""
    names = {path.name for path in folder.iterdir()}
    while folder.name in names:  # of a module
        folder = folder.rename(folder.with_name(f"{folder.name}_"))
    for path in folder.iterdir():
        path.rename(folder.parent / path.name)
    folder.rmdir()
