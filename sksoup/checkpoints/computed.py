"""Tensors that models of transformers compute when they are built, such as sinusoidal positions."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from ..runtime.random_state import preserved_random_state
from ..runtime.shards import sharded_parts

LONGEST_MATCHED = 300  # characters of a name that is matched with patterns of transformers


def unsaved_names(module: nn.Module) -> set[str]:
    """Names that ``save_pretrained`` leaves out because the module computes their values."""
    return _named_by(module, "_keys_to_ignore_on_save") & module.state_dict().keys()


def computed_names(module: nn.Module) -> set[str]:
    """Names that files may lack: ``from_pretrained`` then keeps the module's initial values."""
    patterns = _named_by(module, "_keys_to_ignore_on_load_missing")
    lacking = {
        name for name in module.state_dict() if any(re.search(each, name) for each in patterns)
    }
    return unsaved_names(module) | lacking


def ignored_names(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Names that files may hold and ``from_pretrained`` ignores, such as masks of old versions."""
    patterns = _named_by(module, "_keys_to_ignore_on_load_unexpected")
    short = (name for name in names if len(name) <= LONGEST_MATCHED)
    return {name for name in short if any(re.search(each, name) for each in patterns)}


def counters_of(names: Collection[str]) -> set[str]:
    """BatchNorm's numbers of batches, which ``load_state_dict`` adds where a file lacks them."""
    means = {name for name in names if name.endswith("running_mean")}
    return {
        name
        for name in names
        if name.endswith("num_batches_tracked")
        and name.removesuffix("num_batches_tracked") + "running_mean" in means
    }


def recomputed(module: nn.Module, names: Iterable[str], build: Callable[[], nn.Module]) -> set[str]:
    """Those of these tensors that the module computes: `computed_names` without random values."""
    state = module.state_dict()
    chosen = {n for n in computed_names(module).intersection(names) if not state[n].is_meta}
    if not chosen or sharded_parts(module):  # parameters of sharded ones may not have values yet
        return set()
    with preserved_random_state():
        torch.manual_seed(1)
        again = build().state_dict()
    return {name for name in chosen if torch.equal(again[name], state[name])}


def _named_by(module: nn.Module, attribute: str) -> set[str]:
    """The names or patterns in an attribute of a transformers model; none for other modules.

    transformers has no public function for these; the attributes are documented for its subclasses.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return set()
    return set(getattr(module, attribute, None) or ())
