"""Checkpoints whose values differ between the names of one parameter."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints.base_model import tied_names
from ..checkpoints.collection import CheckpointCollection
from ..exceptions import CheckpointError
from ..runtime.shards import sharded_parts


def refuse_shared_memory(module: nn.Module) -> None:
    """Refuse two parameters with the same memory: a search would give them different values."""
    known: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    if sharded_parts(module):  # each parameter has memory of its own
        return
    for name, value in module.named_parameters():
        if value.is_meta or not value.numel():
            continue
        key = value.data_ptr(), value.shape, value.stride()
        other = known.setdefault(key, name)
        if other != name:
            raise ValueError(
                f"{other!r} and {name!r} are two parameters with the same memory (tied by .data), "
                f"which a soup can't keep equal. Tie them as one parameter: "
                f"b.weight = a.weight instead of b.weight.data = a.weight.data."
            )


def check_tied(module: nn.Module, checkpoints: CheckpointCollection) -> None:
    """Refuse checkpoints with other values by one name of a parameter than by another.

    The module could hold one of them only. Where two names of a parameter are in the files, their
    tensors are read, and no others.
    """
    held = (sorted(checkpoints.layout.keys() & same) for same in tied_names(module))
    pairs = [(name, first) for first, *others in filter(None, held) for name in others]
    for checkpoint in checkpoints if pairs else ():
        with checkpoints.open(checkpoint) as read:
            for name, other in pairs:
                if not _same_values(read(name), read(other)):
                    raise CheckpointError(
                        f"{checkpoint!r} does not fit the module: {other!r} and {name!r} are one "
                        f"parameter of it (tied weights), but have different values in the "
                        f"checkpoint. Give the module that it was saved from, where they are not "
                        f"tied (transformers: 'tie_word_embeddings': false in config.json), or "
                        f"checkpoints without one of the two."
                    )


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))
