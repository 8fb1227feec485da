"""The checkpoints listed in a recipe, and how they are found in a collection."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.low_rank import LowRankCheckpoint
from ..exceptions import RecipeError


@dataclass(frozen=True)
class Ingredient:
    """One checkpoint of a recipe.

    Parameters
    ----------
    name : str
        Name in the collection.
    sha256 : str
        SHA-256 of its file, or of names and values if it was in memory.
    file : str or None, default=None
        File name without the folder; None if it was in memory.
    key : str or None, default=None
        Key of the state dict in its file, if one was passed.
    prefix : str or None, default=None
        Prefix of its tensors' names in the file, if one was passed.

    Examples
    --------
    >>> from sksoup.recipe import Ingredient
    >>> Ingredient("ft00", "9f" * 32, "ft00.safetensors").file
    'ft00.safetensors'
    """

    name: str
    sha256: str
    file: str | None = None
    key: str | None = None
    prefix: str | None = None


@dataclass(frozen=True)
class Base:
    """The base model of the LoRA adapters in a recipe.

    Parameters
    ----------
    sha256 : str
        SHA-256 of its names and values, in a file or in memory.
    without : tuple of str, default=()
        Tensors that are not included in the SHA-256 because all adapters store them as a whole,
        such as a head.

    Examples
    --------
    >>> from sksoup.recipe import Base
    >>> Base("9f" * 32, without=("classifier.bias", "classifier.weight")).without
    ('classifier.bias', 'classifier.weight')
    """

    sha256: str
    without: tuple[str, ...] = ()


def record_base(adapters: Collection[LowRankCheckpoint]) -> Base:
    """The one base of some adapters."""
    whole = frozenset.intersection(*(one.whole for one in adapters))
    without = tuple(sorted(whole))
    digests = {one.base.content_sha256(without) for one in adapters}
    if len(digests) > 1:
        raise RecipeError(
            "The adapters of this collection have different bases, so the recipe can't record one. "
            "Open them together: CheckpointCollection([...], module=base)."
        )
    return Base(digests.pop(), without)


def check_base(base: Base | None, chosen: CheckpointCollection) -> None:
    """Raise an error for adapters on another base than that of the recipe."""
    adapters = chosen.adapters(chosen.names)
    if base is None or not adapters:
        return
    held = frozenset.intersection(*(one.whole for one in adapters.values()))
    if unheld := sorted(set(base.without) - held):
        raise RecipeError(
            f"The recipe excludes {unheld[0]!r} from the SHA-256 of its base, which is allowed "
            f"only for tensors that all its adapters store as a whole. Get the original recipe, or "
            f"fit the soup again."
        )
    for name, one in adapters.items():
        digest = one.base.content_sha256(base.without)
        if digest != base.sha256:
            raise RecipeError(
                f"The base of {name!r} is not the one that the recipe was made with: its SHA-256 "
                f"is {digest[:12]}..., expected {base.sha256[:12]}.... Open the adapters with "
                f"module=base, the original network or its folder (--base on the command line), in "
                f"the dtype that it had."
            )


def select_ingredients(
    ingredients: Sequence[Ingredient],
    is_used: NDArray[np.bool_],
    layers: Mapping[str, int],
    checkpoints: CheckpointCollection,
) -> CheckpointCollection:
    """The checkpoints of the used ingredients, after checking their tensor names."""
    chosen = checkpoints._renamed(used_names(ingredients, is_used, checkpoints), layers)
    if unlike := sorted(chosen.layout.keys() ^ layers.keys()):
        raise RecipeError(
            f"The tensors of the checkpoints differ from those of the recipe: {unlike[0]!r} is in "
            f"only one of them, as are {len(unlike) - 1} more of {len(layers)}. Open the "
            f"checkpoints as for the fit, with the same module or prefix: "
            f"CheckpointCollection(..., module=, prefix=), or --prefix on the command line."
        )
    return chosen


def used_names(
    ingredients: Sequence[Ingredient],
    is_used: NDArray[np.bool_],
    checkpoints: CheckpointCollection,
) -> dict[str, str]:
    """The names of the used ingredients, and those that they have in a collection."""
    return {one.name: find_ingredient(one, checkpoints) for one in compress(ingredients, is_used)}


def find_ingredient(ingredient: Ingredient, checkpoints: CheckpointCollection) -> str:
    """The name of an ingredient in a collection, found by its name or its hash."""
    # the recorded hash of values in memory may match a checkpoint that is now in a file
    digest = checkpoints.sha256 if ingredient.file else checkpoints.content_sha256
    name = ingredient.name
    if name in checkpoints:
        match: str | None = name
        if digest(name) != ingredient.sha256:
            raise RecipeError(
                f"The checkpoint {name!r} is not the one that the recipe was made of: its SHA-256 "
                f"is {digest(name)[:12]}..., expected {ingredient.sha256[:12]}.... Find the "
                f"original, or fit the soup again."
            )
    else:
        match = next((other for other in checkpoints if digest(other) == ingredient.sha256), None)
    if match is None:
        raise RecipeError(
            f"The recipe needs {name!r} (file {ingredient.file!r}, SHA-256 "
            f"{ingredient.sha256[:12]}...), but none of the {len(checkpoints)} checkpoints "
            f"has that name or that content. Add the missing checkpoint; if it is one of several "
            f"of a training run, open all of them (which='all')."
        )
    key, prefix = checkpoints._part(match)
    for what, given, recorded in (
        ("key", key, ingredient.key),
        ("prefix", prefix, ingredient.prefix),
    ):
        if None not in (given, recorded) and given != recorded:
            raise RecipeError(
                f"The recipe was made with {what}={recorded!r} of {match!r}, but the checkpoints "
                f"were opened with {what}={given!r}. Open them with the same {what}."
            )
    return match
