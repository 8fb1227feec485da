"""The record of a soup: what was mixed and how, so that anyone can rebuild and verify it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ._formats import read_metadata, write_safetensors, write_text
from ._mix import mix
from .checkpoints import CheckpointCollection
from .exceptions import CheckpointError, RecipeError

__all__ = ["Ingredient", "Recipe"]

FORMAT_VERSION = 1
METADATA_KEY = "sksoup"


@dataclass(frozen=True)
class Ingredient:
    """One checkpoint of a recipe.

    Parameters
    ----------
    name : str
        Its name in the collection.
    sha256 : str
        Of its file, or of names and values when it lived in memory.
    file : str or None
        File name (no folder), None when it lived in memory.

    Examples
    --------
    >>> from sksoup.recipe import Ingredient
    >>> Ingredient("ft00", "9f" * 32, "ft00.safetensors").file
    'ft00.safetensors'
    """

    name: str
    sha256: str
    file: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Record what was mixed: enough to rebuild a soup's weights bit for bit.

    Parameters
    ----------
    method : str
        Name of the estimator that found the coefficients.
    ingredients : tuple of Ingredient
        Every checkpoint of the collection, in its order.
    coef : ndarray of shape (n_layers, n_checkpoints), dtype float64
        Coefficients; rows sum to 1.
    layers : dict of str to int
        Row of ``coef`` for every tensor name.
    layer_names : tuple of str
        Names of the rows.
    params : dict
        Parameters of the estimator, as far as JSON can hold them.
    scores : dict of str to float
        Held-out scores by name: ``"soup"`` and those of single checkpoints, where known.
    temperature : float, default=1.0
        Learned-Soup's factor on the logits; never folded into the weights.
    recalibrated : tuple of str, default=()
        Tensors that were re-estimated from data and that `cook` can't rebuild.
    versions : dict of str to str
        Versions of sksoup, torch, ...

    Notes
    -----
    Stored as JSON in the metadata of the soup's ``.safetensors`` file, or as a ``.json`` file.
    Coefficients are written with 17 significant digits, which float64 survives exactly. Unknown
    fields of newer versions are ignored on reading; a newer format version is refused.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, Recipe
    >>> nets = {"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([3.0])}}
    >>> collection = CheckpointCollection(nets)
    >>> recipe = Recipe.record("by hand", collection, [[0.5, 0.5]], layers={"w": 0})
    >>> recipe.cook(collection)
    {'w': tensor([2.])}
    """

    method: str
    ingredients: tuple[Ingredient, ...]
    coef: NDArray[np.float64]
    layers: dict[str, int]
    layer_names: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    recalibrated: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def record(
        cls,
        method: str,
        checkpoints: CheckpointCollection,
        coef: Any,
        *,
        layers: Mapping[str, int],
        layer_names: tuple[str, ...] | None = None,
        **fields: Any,
    ) -> Recipe:
        """Make the recipe of a collection and coefficients; hashes the files.

        Parameters
        ----------
        method : str
            Where the coefficients come from.
        checkpoints : CheckpointCollection
            What was mixed.
        coef : array-like of shape (n_checkpoints,) or (n_layers, n_checkpoints)
            Coefficients.
        layers : mapping of str to int
            Row of ``coef`` for every tensor name.
        layer_names : tuple of str or None, default=None
            Names of the rows, by default their numbers.
        **fields
            Any other field of `Recipe`.

        Returns
        -------
        recipe : Recipe
            The record.
        """
        rows = np.atleast_2d(np.asarray(coef, dtype=np.float64))
        paths = {name: checkpoints.path(name) for name in checkpoints}
        ingredients = tuple(
            Ingredient(name, checkpoints.sha256(name), path.name if path else None)
            for name, path in paths.items()
        )
        names = layer_names or tuple(str(row) for row in range(len(rows)))
        return cls(method, ingredients, rows, dict(layers), names, **fields)

    def to_json(self) -> str:
        """Return the recipe as a JSON text.

        Returns
        -------
        text : str
            One object; ``format_version`` says how to read it.
        """
        document = {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "coef": self.coef.tolist(),
        }
        return json.dumps(document, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Recipe:
        """Read a recipe from JSON.

        Parameters
        ----------
        text : str
            As `to_json` writes it.
        source : str, default="the text"
            What to call it in errors.

        Returns
        -------
        recipe : Recipe
            The record.

        Raises
        ------
        RecipeError
            Not JSON, not a recipe, or written by a newer format version.
        """
        try:
            document = json.loads(text)
            version = document["format_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise RecipeError(f"{source} is not a sksoup recipe: {error!r}.") from error
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise RecipeError(
                f"{source} has recipe format {version!r}, expected at most {FORMAT_VERSION}. "
                f"Read it with a newer sksoup."
            )
        try:
            return cls(
                method=str(document["method"]),
                ingredients=tuple(
                    Ingredient(i["name"], i["sha256"], i.get("file"))
                    for i in document["ingredients"]
                ),
                coef=np.array(document["coef"], dtype=np.float64),
                layers={str(name): int(row) for name, row in document["layers"].items()},
                layer_names=tuple(document["layer_names"]),
                params=dict(document.get("params", {})),
                scores=dict(document.get("scores", {})),
                temperature=float(document.get("temperature", 1.0)),
                recalibrated=tuple(document.get("recalibrated", ())),
                versions=dict(document.get("versions", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"{source} is not a whole sksoup recipe: {error!r}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a soup's ``.safetensors`` file or from a ``.json`` file.

        Parameters
        ----------
        path : str or path-like
            Where `save` or ``soup.save`` wrote it.

        Returns
        -------
        recipe : Recipe
            The record.

        Raises
        ------
        RecipeError
            The file holds no recipe.
        CheckpointError
            The file can't be read.
        """
        where = Path(path)
        if where.suffix != ".safetensors":
            try:
                text = where.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{str(where)!r} can't be read: {error}.") from error
            return cls.from_json(text, repr(str(where)))
        metadata = read_metadata(where)
        if METADATA_KEY not in metadata:
            raise RecipeError(
                f"{str(where)!r} holds weights but no sksoup recipe. Only files written by "
                f"soup.save carry one."
            )
        return cls.from_json(metadata[METADATA_KEY], repr(str(where)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe alone, as JSON, atomically.

        Parameters
        ----------
        path : str or path-like
            A ``.json`` file.
        """
        write_text(Path(path), self.to_json())

    def save_weights(
        self, path: str | os.PathLike[str], weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Write weights with this recipe in the file's metadata, atomically.

        Parameters
        ----------
        path : str or path-like
            A ``.safetensors`` file.
        weights : mapping of str to Tensor
            The soup.

        Raises
        ------
        ValueError
            Another suffix.
        """
        where = Path(path)
        if where.suffix != ".safetensors":
            raise ValueError(f"{str(where)!r} must end in '.safetensors', got {where.suffix!r}.")
        write_safetensors(where, weights, {METADATA_KEY: self.to_json(), "format": "pt"})

    def cook(self, checkpoints: CheckpointCollection | Any) -> dict[str, torch.Tensor]:
        """Rebuild the soup's weights from the ingredients, bit for bit.

        Parameters
        ----------
        checkpoints : CheckpointCollection
            Or anything its constructor takes. Ingredients are found by name, else by hash; those
            with coefficient 0 throughout may be missing. More checkpoints do no harm.

        Returns
        -------
        state_dict : dict of str to Tensor
            As ``soup.state_dict()``, `recalibrated` tensors excepted (they are mixed).

        Raises
        ------
        RecipeError
            An ingredient is missing, or its contents are not those the soup was made of.

        Notes
        -----
        Reads each used file twice: once for its hash, once to mix.
        """
        if not isinstance(checkpoints, CheckpointCollection):
            checkpoints = CheckpointCollection(checkpoints)
        used = np.flatnonzero(self.coef.any(axis=0))
        names = [self._find(self.ingredients[k], checkpoints) for k in used]
        return mix(checkpoints.select(names), self.coef[:, used], layers=self.layers)

    def _find(self, ingredient: Ingredient, checkpoints: CheckpointCollection) -> str:
        # an ingredient that lived in memory is known by its values, whatever holds them now
        digest = checkpoints.sha256 if ingredient.file else checkpoints.content_sha256
        name = ingredient.name
        if name in checkpoints:
            if digest(name) == ingredient.sha256:
                return name
            raise RecipeError(
                f"The checkpoint {name!r} is not the one the recipe was made of: its SHA-256 is "
                f"{digest(name)[:12]}..., expected {ingredient.sha256[:12]}.... Find the original, "
                f"or fit the soup again."
            )
        match = next((other for other in checkpoints if digest(other) == ingredient.sha256), None)
        if match is None:
            raise RecipeError(
                f"The recipe needs {name!r} (file {ingredient.file!r}, SHA-256 "
                f"{ingredient.sha256[:12]}...), and the {len(checkpoints)} checkpoints given hold "
                f"neither that name nor that content."
            )
        return match
