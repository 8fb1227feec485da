"""The record of a soup: what was mixed and how, so that anyone can rebuild and verify it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.write import write_text
from ..tables import Table, notebook_html, shortened
from .card import model_card
from .document import check_header, read_document, write_document
from .files import METADATA_KEY, read_recipe, write_soup
from .ingredients import Base, Ingredient, check_base, record_base, select_ingredients
from .layers import check_layers
from .mix import mix, mix_into
from .verification import Verification, verify


@dataclass(frozen=True, eq=False, repr=False)
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
        Parameters of the estimator; those that JSON can't hold are kept as text.
    scores : dict of str to float
        Held-out scores of single checkpoints by name, where they were computed or given.
    temperature : float, default=1.0
        Learned-Soup's factor on the logits; never folded into the weights.
    recalibrated : tuple of str, default=()
        Tensors that were re-estimated from data and that `cook` can't rebuild: statistics of
        BatchNorm, and nothing else.
    versions : dict of str to str
        Versions of sksoup, torch, ...
    classes : tuple, default=()
        Labels of the outputs, in order, where JSON can hold them; for integers names, if known.
    weights_sha256 : str or None, default=None
        SHA-256 of the soup's tensors as they were written: names, dtypes, shapes and bytes. `save`
        of a soup fills it in; in a folder of shards, whose recipe is written before the tensors,
        it is None. Recipes that differ in it alone are equal.

    held_out : tuple of (float, int) or None, default=None
        Score of the soup on the held-out rows that it was selected by, and their number; None
        where no recipe measured it.
    base : Base or None, default=None
        The network that LoRA adapters among the ingredients add to.

    Notes
    -----
    Stored as JSON in the metadata of the soup's ``.safetensors`` file, or as a ``.json`` file.
    Coefficients are written with 17 significant digits, which float64 survives exactly, or, if
    there are more than 4,096 of them, as the bytes of little-endian float64 in Base64. Unknown
    fields are ignored on reading; a newer format version is an error.

    The document contains its own SHA-256 (``sha256``: of the JSON without it, with sorted keys and
    no spaces), which is compared on reading. It shows accidental changes. It is not a signature:
    those who change a recipe on purpose can write the SHA-256 that fits. Format version 1 had none.

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
    classes: tuple[Any, ...] = ()
    weights_sha256: str | None = None
    held_out: tuple[float, int] | None = None
    base: Base | None = None

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
        ingredients = []
        for name in checkpoints:
            digest, path = checkpoints.sha256(name), checkpoints.path(name)
            file = path.name if path else None
            ingredients.append(Ingredient(name, digest, file, checkpoints._key(name)))
        names = layer_names or tuple(str(row) for row in range(len(rows)))
        adapters = checkpoints.adapters(checkpoints.names)
        base = record_base(adapters.values()) if adapters else None
        return cls(method, tuple(ingredients), rows, dict(layers), names, base=base, **fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._unsaved() == other._unsaved()

    def __hash__(self) -> int:
        return hash(self._unsaved())

    def _unsaved(self) -> str:
        """What two recipes are compared by: all that does not come from saving the weights."""
        return replace(self, weights_sha256=None).to_json()

    def __repr__(self) -> str:
        n, n_layers = len(self.ingredients), len(self.coef)
        return (
            f"Recipe({shortened(str(self.method))!r}, {self.is_used().sum()} of {n} checkpoint"
            f"{'s' * (n != 1)}, {n_layers} layer{'s' * (n_layers != 1)})"
        )

    def _repr_html_(self) -> str:
        """The ingredients, those with the largest coefficients first."""
        mean = self.coef.mean(axis=0)
        found = zip(self.ingredients, mean, self.is_used(), strict=False)
        used = sorted((one for one in found if one[2]), key=lambda one: -abs(one[1]))
        scores = self.scores
        rows = [
            (one.name, f"{coef:.4f}", f"{scores[one.name]:.4f}" if one.name in scores else "-",
             one.sha256[:12])
            for one, coef, _ in used
        ]  # fmt: skip
        table = Table(
            ("checkpoint", "mean coefficient", "validation score", "SHA-256"), rows, (0, 3)
        )
        return notebook_html(repr(self), table.without_empty())

    def to_json(self) -> str:
        """Return the recipe as a JSON text.

        Returns
        -------
        text : str
            One object; ``format_version`` says how to read it.

        Raises
        ------
        RecipeError
            The fields contradict each other, so that no one could read the text, or it would be
            larger than 100 MB.
        """
        return write_document(self)

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
            Not JSON, not a recipe, written by a newer format version, or changed after it was
            written. All fields are checked before any is used.
        """
        return cls(**read_document(text, source))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a soup's ``.safetensors`` file or folder, or from a ``.json`` file.

        Parameters
        ----------
        path : str or path-like
            Where `save`, ``soup.save``, ``soup.save_pretrained`` or ``cook(out=...)`` wrote it. For
            ``soup.pt`` and the like, ``soup.recipe.json`` beside it is read.

        Returns
        -------
        recipe : Recipe
            The record.

        Raises
        ------
        RecipeError
            The file holds no recipe, or one that `from_json` refuses.
        CheckpointError
            The file can't be read.
        """
        return cls.from_json(read_recipe(Path(path)), repr(os.fspath(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe alone, as JSON, atomically.

        Parameters
        ----------
        path : str or path-like
            A ``.json`` file.

        Raises
        ------
        RecipeError
            As `to_json`.
        """
        write_text(Path(path), self.to_json())

    def save_weights(
        self,
        path: str | os.PathLike[str],
        weights: Mapping[str, torch.Tensor],
        stored: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write weights, with this recipe and their SHA-256 in it or beside it, atomically.

        Parameters
        ----------
        path : str or path-like
            A ``.safetensors`` file, with the recipe in its metadata; or a ``.pt``, ``.pth``,
            ``.bin`` or ``.ckpt`` file: a plain state dict of ``torch.save``, with the recipe beside
            it (``soup.pt`` and ``soup.recipe.json``).
        weights : mapping of str to Tensor
            The soup, by the recipe's names, of which the SHA-256 is taken.
        stored : mapping of str to Tensor or None, default=None
            The same by other names, as it is written.

        Raises
        ------
        ValueError
            Another suffix.
        RecipeError
            As `to_json`, or the header of a .safetensors file would be larger than 100 MB.
        OSError
            The disk is full, or the like. What was there before is left, both files of it.
        """
        write_soup(Path(path), self, weights, stored)

    def is_used(self) -> NDArray[np.bool_]:
        """Return which checkpoints have a coefficient other than 0.

        Returns
        -------
        used : ndarray of shape (n_checkpoints,), bool
        """
        used: NDArray[np.bool_] = np.count_nonzero(self.coef, axis=0) > 0
        return used

    @overload
    def cook(
        self, checkpoints: CheckpointCollection | Any, out: None = None
    ) -> dict[str, torch.Tensor]: ...

    @overload
    def cook(
        self, checkpoints: CheckpointCollection | Any, out: str | os.PathLike[str]
    ) -> Path: ...

    def cook(
        self, checkpoints: CheckpointCollection | Any, out: str | os.PathLike[str] | None = None
    ) -> dict[str, torch.Tensor] | Path:
        """Rebuild the soup's weights from the ingredients, bit for bit.

        Parameters
        ----------
        checkpoints : CheckpointCollection
            Or anything its constructor takes. Ingredients are found by name, else by hash; those
            with coefficient 0 throughout may be missing. Further checkpoints are ignored.
        out : str or path-like, default=None
            A new folder to write the weights to, in shards that contain the recipe, for models
            larger than memory (see `mix`). There it has no ``recalibrated`` tensors: all are mixed.

        Returns
        -------
        state_dict : dict of str to Tensor, or Path
            As ``soup.state_dict()``, `recalibrated` tensors excepted (they are mixed). With
            ``out``, the path of that folder.

        Raises
        ------
        RecipeError
            An ingredient is missing, its contents are not those the soup was made of, or the recipe
            is too large for the header of a shard.

        Notes
        -----
        Reads each used file twice: once for its hash, once to mix.
        """
        checkpoints, is_used = _collection(checkpoints), self.is_used()
        chosen = select_ingredients(self.ingredients, is_used, self.layers, checkpoints)
        check_base(self.base, chosen)
        coef = self.coef[:, is_used]
        if out is None:
            return mix(chosen, coef, layers=self.layers)
        rows = check_layers(self.layers, chosen.layout, len(coef))
        mixed = replace(self, recalibrated=(), weights_sha256=None)
        text = (mixed if self.recalibrated else self).to_json()
        check_header(text, self.layers)
        return mix_into(Path(out), chosen, coef, rows, {METADATA_KEY: text})

    def verify(
        self,
        weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
        checkpoints: CheckpointCollection | Any,
    ) -> Verification:
        """Rebuild a soup tensor by tensor and compare it bit for bit; compare its SHA-256.

        What this proves: the ingredients, with the coefficients of the recipe, give the tensors
        that are not in `Verification.unchecked`. All else (scores, temperature, classes, method,
        versions, tensors that were re-estimated from data) can't be rebuilt from the ingredients:
        it is covered by the SHA-256 that the recipe contains, which shows accidental changes. No
        signature is involved: a file from a source that you don't trust may have any SHA-256.

        Parameters
        ----------
        weights : mapping of str to Tensor, or path
            The soup: a state dict, a file, or a folder. Other weights in the folder, or beside a
            file in the folder of a model, are named: a program may load them instead.
        checkpoints : CheckpointCollection
            Or anything its constructor takes: the ingredients.

        Returns
        -------
        findings : Verification
            What differs, what can't be checked, and which ingredients are not those recorded.

        Raises
        ------
        CheckpointError
            A file can't be read, a configuration names other weights, or a mix is not finite.
        RecipeError
            The ingredients hold other tensors than the recipe; the soup is a container, or the
            file of an adapter.

        Notes
        -----
        Reads each used file twice, and the soup twice where its SHA-256 was recorded. Memory: a few
        tensors.

        Examples
        --------
        >>> import torch
        >>> from sksoup import CheckpointCollection, Recipe
        >>> nets = CheckpointCollection([{"w": torch.ones(1)}, {"w": torch.ones(1) * 3}])
        >>> recipe = Recipe.record("by hand", nets, [0.5, 0.5], layers={"w": 0})
        >>> recipe.verify({"w": torch.tensor([2.0])}, nets).ok
        True
        >>> recipe.verify({"w": torch.tensor([2.5])}, nets).differing
        {'w': 'has other values'}
        """
        return verify(self, weights, _collection(checkpoints))

    def to_card(self, checkpoints: CheckpointCollection | None = None) -> str:
        """Describe the soup in words, as a Hugging Face–style model card.

        Parameters
        ----------
        checkpoints : CheckpointCollection or None, default=None
            The ingredients, for the card of a Hugging Face folder: what their ``config.json`` and
            cards agree on (base model, licence, task, labels) is added, and how to load it.

        Returns
        -------
        card : str
            Markdown with YAML front matter. Names and all other texts are escaped.
        """
        return model_card(self, checkpoints)


def _collection(checkpoints: CheckpointCollection | Any) -> CheckpointCollection:
    is_collection = isinstance(checkpoints, CheckpointCollection)
    return checkpoints if is_collection else CheckpointCollection(checkpoints)
