"""The pretrained weights: a checkpoint of the collection, or one that is added to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.folders import place_of_checkpoint

START = "start"  # the name of pretrained weights that are added to the collection
Start: TypeAlias = str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module


def name_of_start(checkpoints: CheckpointCollection, start: Any) -> str:
    """The name that the pretrained weights have in the collection with them."""
    return _known(checkpoints, start) or START


def with_start(checkpoints: CheckpointCollection, start: Any) -> CheckpointCollection:
    """The collection with the pretrained weights; unchanged if they are in it."""
    if _known(checkpoints, start) is not None:
        return checkpoints
    if START in checkpoints:
        if _is_start(checkpoints, start):
            return checkpoints
        raise ValueError(
            f"The collection has a checkpoint named {START!r}, and other pretrained weights were "
            f"passed as start. Drop that checkpoint, or pass start={START!r} to use it."
        )
    return checkpoints.add(START, start)


def _is_start(checkpoints: CheckpointCollection, start: Any) -> bool:
    """Whether the checkpoint named "start" has the values of these pretrained weights."""
    others = [name for name in checkpoints if name != START]
    if not others:
        return False
    given = checkpoints.select(others).add(START, start)
    return given.content_sha256(START) == checkpoints.content_sha256(START)


def _known(checkpoints: CheckpointCollection, start: Any) -> str | None:
    """The checkpoint that ``start`` is the name or the path of, if there is one."""
    if isinstance(start, str) and start in checkpoints:
        return start
    if not isinstance(start, (str, os.PathLike)):
        return None
    place = place_of_checkpoint(os.path.expanduser(start))
    paths = ((name, checkpoints.path(name)) for name in checkpoints)
    return next((n for n, path in paths if path and place_of_checkpoint(path) == place), None)
