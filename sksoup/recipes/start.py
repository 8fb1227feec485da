"""The pretrained start: a checkpoint of the collection, or one that is added to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ..checkpoints.collection import CheckpointCollection

START = "start"  # the name of a start that is none of the collection's checkpoints
Start: TypeAlias = str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module


def name_of_start(checkpoints: CheckpointCollection, start: Any) -> str:
    """What the start is called in the collection, once it is in it."""
    return start if isinstance(start, str) and start in checkpoints else START


def with_start(checkpoints: CheckpointCollection, start: Any) -> CheckpointCollection:
    """The collection with the start in it: as it is where ``start`` is a name of it."""
    if isinstance(start, str) and start in checkpoints:
        return checkpoints
    if START in checkpoints:
        raise ValueError(
            f"The collection holds a checkpoint named {START!r} beside the start that was given: "
            f"drop it, or say start={START!r}."
        )
    return checkpoints.add(START, start)
