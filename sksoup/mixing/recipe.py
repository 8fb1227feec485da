"""The record of a soup, from which its weights can be rebuilt and verified."""

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
from ..checkpoints.read import RECIPE_KEY
from ..checkpoints.write import SHARD_BYTES, write_text
from ..runtime.memory import parse_bytes
from ..tables import Table, notebook_html, shortened
from .card import model_card
from .document import check_header, read_document, write_document
from .files import read_recipe, write_soup
from .ingredients import Base, Ingredient, check_base, record_base, select_ingredients
from .layers import check_layers
from .mix import as_dtype, in_order, mix, mix_into
from .verification import Verification, verify


@dataclass(frozen=True, eq=False, repr=False)
class Recipe:
    """Record of a soup, sufficient to rebuild its weights bit for bit.

    Parameters
    ----------
    method : str
        Name of the estimator that found the coefficients.
    ingredients : tuple of Ingredient
        All checkpoints of the collection, in order.
    coef : ndarray of shape (n_layers, n_checkpoints), dtype float64
        Coefficients; rows sum to 1.
    layers : dict of str to int
        For every tensor name, the index of its row in ``coef``.
    layer_names : tuple of str
        Names of the rows of ``coef``.
    params : dict
        Parameters of the estimator. Those that JSON can't represent are stored as text.
    scores : dict of str to float
        Held-out scores of single checkpoints by name, if they were computed or passed.
    temperature : float, default=1.0
        Learned-Soup's factor on the logits. It is not part of the weights.
    recalibrated : tuple of str, default=()
        Names of BatchNorm statistics that were re-estimated from data and that `cook` can't
        rebuild.
    versions : dict of str to str
        Versions of sksoup, torch, ...
    classes : tuple, default=()
        Labels in the order of the outputs, if JSON can represent them; names instead of integers,
        if known.
    weights_sha256 : str or None, default=None
        SHA-256 of the names, dtypes, shapes and bytes of the soup's tensors. It is set when a soup
        is saved; in a folder of shards, where the recipe is written before the tensors, it is None.
        Recipes that differ only in it are equal.

    held_out : tuple of (float, int) or None, default=None
        Score of the soup on the held-out rows that it was selected on, and their number; None if it
        was not measured.
    base : Base or None, default=None
        The base model of LoRA adapters among the ingredients.
    dtype : str or None, default=None
        Dtype to which the floating-point tensors were converted, such as "bfloat16". None is that
        of the ingredients.

    Notes
    -----
    A recipe is stored as JSON in the metadata of the soup's ``.safetensors`` file, or as a
    ``.json`` file. Coefficients are written with 17 significant digits, which is exact for float64;
    if there are more than 4,096, they are written as little-endian float64 in Base64. On reading,
    unknown fields are ignored, and a newer format version raises an error.

    The document contains its own SHA-256 (``sha256``, of the JSON without this field, with sorted
    keys and no spaces), which is checked on reading. It detects accidental changes, but it is not a
    signature: someone who changes a recipe on purpose can also change the SHA-256. Format version 1
    has none.

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
    dtype: str | None = None

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
        """Make a recipe from a collection and coefficients; hashes the files.

        Parameters
        ----------
        method : str
            Name of the method that found the coefficients.
        checkpoints : CheckpointCollection
            The checkpoints that were mixed.
        coef : array-like of shape (n_checkpoints,) or (n_layers, n_checkpoints)
            Coefficients. A Series whose index, or a DataFrame whose columns are names of
            checkpoints is matched by name.
        layers : mapping of str to int
            For every tensor name, the index of its row in ``coef``.
        layer_names : tuple of str or None, default=None
            Names of the rows of ``coef``. By default their numbers.
        **fields
            Other fields of `Recipe`.

        Returns
        -------
        recipe : Recipe
            The record.
        """
        given = in_order(coef, checkpoints.names)
        rows = np.atleast_2d(np.asarray(given, dtype=np.float64))
        if rows.ndim != 2 or rows.shape[1] != len(checkpoints):
            raise ValueError(
                f"coef has shape {np.shape(given)}, expected one coefficient for each of the "
                f"{len(checkpoints)} checkpoints."
            )
        ingredients = []
        for name in checkpoints:
            digest, path = checkpoints.sha256(name), checkpoints.path(name)
            file = path.name if path else None
            ingredients.append(Ingredient(name, digest, file, *checkpoints._part(name)))
        names = layer_names or tuple(str(row) for row in range(len(rows)))
        adapters = checkpoints.adapters(checkpoints.names)
        base = record_base(adapters.values()) if adapters else None
        return cls(method, tuple(ingredients), rows, dict(layers), names, base=base, **fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._unsaved() == other._unsaved()

    def __hash__(self) -> int:
        return hash(self._unsaved())

    def _unsaved(self) -> str:
        """The fields by which recipes are compared: all but those set when weights are saved."""
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
            A JSON object, whose ``format_version`` defines the format.

        Raises
        ------
        RecipeError
            The fields are inconsistent, or the text would be larger than 100 MB.
        """
        return write_document(self)

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Recipe:
        """Read a recipe from JSON.

        Parameters
        ----------
        text : str
            Text written by `to_json`.
        source : str, default="the text"
            Name of the source in error messages.

        Returns
        -------
        recipe : Recipe
            The record.

        Raises
        ------
        RecipeError
            The text is not JSON, not a recipe, has a newer format version, or was changed after it
            was written. All fields are checked before any is used.
        """
        return cls(**read_document(text, source))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a soup's ``.safetensors`` file or folder, or from a ``.json`` file.

        Parameters
        ----------
        path : str or path-like
            File or folder written by `save`, ``soup.save``, ``soup.save_pretrained`` or
            ``cook(out=...)``. For a file such as ``soup.pt``, ``soup.recipe.json`` next to it is
            read.

        Returns
        -------
        recipe : Recipe
            The record.

        Raises
        ------
        RecipeError
            The file has no recipe, or one that `from_json` rejects.
        CheckpointError
            The file can't be read.
        """
        return cls.from_json(read_recipe(Path(path)), repr(os.fspath(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write only the recipe, as JSON, atomically.

        Parameters
        ----------
        path : str or path-like
            Path of a ``.json`` file.

        Raises
        ------
        RecipeError
            As for `to_json`.
        """
        write_text(Path(path), self.to_json())

    def save_weights(
        self,
        path: str | os.PathLike[str],
        weights: Mapping[str, torch.Tensor],
        stored: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write weights with this recipe and their SHA-256, atomically.

        Parameters
        ----------
        path : str or path-like
            Path of a ``.safetensors`` file, with the recipe in its metadata, or of a ``.pt``,
            ``.pth``, ``.bin`` or ``.ckpt`` file: a plain state dict written by ``torch.save``, with
            the recipe next to it (``soup.pt`` and ``soup.recipe.json``).
        weights : mapping of str to Tensor
            The soup, by the names in the recipe. The SHA-256 is that of these tensors.
        stored : mapping of str to Tensor or None, default=None
            The same tensors by other names, with which they are written.

        Raises
        ------
        ValueError
            ``path`` has another suffix.
        FileExistsError
            The recipe beside ``path`` is that of another file, or is no recipe. Nothing is written.
        RecipeError
            As for `to_json`, or the header of a .safetensors file would be larger than 100 MB.
        OSError
            Writing failed, for example because the disk is full. Existing files are unchanged.
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
        self,
        checkpoints: CheckpointCollection | Any,
        out: str | os.PathLike[str],
        shard_size: int | str = SHARD_BYTES,
    ) -> Path: ...

    def cook(
        self,
        checkpoints: CheckpointCollection | Any,
        out: str | os.PathLike[str] | None = None,
        shard_size: int | str = SHARD_BYTES,
    ) -> dict[str, torch.Tensor] | Path:
        """Rebuild the soup's weights from the ingredients, bit for bit.

        Parameters
        ----------
        checkpoints : CheckpointCollection
            The ingredients, or anything that its constructor accepts. Ingredients are found by name
            or by hash. Those whose coefficients are all 0 may be missing. Other checkpoints are
            ignored.
        out : str or path-like, default=None
            A new folder to which the weights are written in shards that contain the recipe, for
            models larger than memory (see `mix`). In it, all tensors are mixed, so the recipe has
            no ``recalibrated`` ones.
        shard_size : int or str, default="5GB"
            Maximum size of a file in ``out``, in bytes or as a string such as "2GB".

        Returns
        -------
        state_dict : dict of str to Tensor, or Path
            The same as ``soup.state_dict()``, except for the `recalibrated` tensors, which are
            mixed. With ``out``, the path of that folder.

        Raises
        ------
        RecipeError
            An ingredient is missing or its contents differ from those that the soup was made of, or
            the recipe is too large for the header of a shard.

        Notes
        -----
        Each used file is read twice: once for its hash and once for mixing.
        """
        checkpoints, is_used = _collection(checkpoints), self.is_used()
        chosen = select_ingredients(self.ingredients, is_used, self.layers, checkpoints)
        check_base(self.base, chosen)
        coef, dtype = self.coef[:, is_used], as_dtype(self.dtype)
        most = parse_bytes(shard_size, "shard_size")
        if out is None:
            return mix(chosen, coef, layers=self.layers, dtype=dtype)
        rows = check_layers(self.layers, chosen.layout, len(coef))
        mixed = replace(self, recalibrated=(), weights_sha256=None)
        text = (mixed if self.recalibrated else self).to_json()
        check_header(text, self.layers)
        return mix_into(Path(out), chosen, coef, rows, {RECIPE_KEY: text}, dtype, most)

    def verify(
        self,
        weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
        checkpoints: CheckpointCollection | Any,
    ) -> Verification:
        """Rebuild a soup tensor by tensor, and compare it and its SHA-256 with given weights.

        This proves that the ingredients, mixed with the coefficients of the recipe, give all
        tensors that are not in `Verification.unchecked`. Everything else (scores, temperature,
        classes, method, versions, tensors that were re-estimated from data) can't be rebuilt from
        the ingredients. It is covered only by the SHA-256 in the recipe, which detects accidental
        changes. The SHA-256 is not a signature: a file from an untrusted source may contain any
        SHA-256.

        Parameters
        ----------
        weights : mapping of str to Tensor, or path
            The soup: a state dict, a file or a folder. Other weights in the folder, or next to a
            file in a model folder, are reported, because a program may load them instead.
        checkpoints : CheckpointCollection
            The ingredients, or anything that its constructor accepts.

        Returns
        -------
        findings : Verification
            Tensors that differ or can't be checked, and ingredients that are not those recorded.

        Raises
        ------
        CheckpointError
            A file can't be read, a configuration refers to other weights, or a mix is not finite.
        RecipeError
            The tensors of the ingredients differ from those in the recipe; or the soup is a
            training checkpoint or an adapter.

        Notes
        -----
        Each used file is read twice, as is the soup if its SHA-256 was recorded. Memory: a few
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
        """Return a model card of the soup in the style of Hugging Face.

        Parameters
        ----------
        checkpoints : CheckpointCollection or None, default=None
            The ingredients, for the card of a Hugging Face folder. Information on which their
            ``config.json`` files and cards agree (base model, license, task, labels) is added, as
            well as instructions for loading.

        Returns
        -------
        card : str
            Markdown with YAML front matter. All names and other texts are escaped.
        """
        return model_card(self, checkpoints)


def _collection(checkpoints: CheckpointCollection | Any) -> CheckpointCollection:
    is_collection = isinstance(checkpoints, CheckpointCollection)
    return checkpoints if is_collection else CheckpointCollection(checkpoints)
