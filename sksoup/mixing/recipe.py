"""The record of a soup: what was mixed and how, so that anyone can rebuild and verify it."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.read import (
    INDEX,
    Read,
    TensorInfo,
    open_weights,
    read_metadata,
    same_bits,
    write_safetensors,
    write_text,
)
from ..exceptions import CheckpointError, RecipeError
from .layers import check_layers
from .mix import check_coef, mix, mix_into, mix_some

__all__ = ["Ingredient", "Recipe", "Verification"]

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
    file : str or None, default=None
        File name (no folder), None when it lived in memory.
    key : str or None, default=None
        Which state dict of its container, where that was said.

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


@dataclass(frozen=True)
class Verification:
    """Hold what `Recipe.verify` found; printed, it says so in words.

    Parameters
    ----------
    differing : dict of str to str
        Tensors of the soup that are not what its recipe gives, and how they differ.
    unchecked : dict of str to str
        Tensors that could not be rebuilt, and why.
    ingredients : dict of str to str
        For every checkpoint of the recipe ``"ok"``, ``"unused"``, or what is wrong with it.
    n_tensors : int
        Tensors in the recipe.

    Examples
    --------
    >>> from sksoup.recipe import Verification
    >>> print(Verification({}, {}, {"a": "ok", "b": "unused"}, 4))
    Verified: 4 of 4 tensors are bit for bit what the recipe gives.
    1 of 2 ingredients used, SHA-256 as recorded.
    """

    differing: dict[str, str]
    unchecked: dict[str, str]
    ingredients: dict[str, str]
    n_tensors: int

    @property
    def ok(self) -> bool:
        """Whether everything that could be checked is right, and something could be."""
        return not self.differing and len(self.unchecked) < max(1, self.n_tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as plain dicts.

        Returns
        -------
        findings : dict
            Ready for JSON, with ``"ok"``.
        """
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lost = {
            name: state for name, state in self.ingredients.items() if state not in ("ok", "unused")
        }
        used = sum(state != "unused" for state in self.ingredients.values())
        same = (
            self.n_tensors
            - len(self.unchecked)
            - sum("not in the recipe" not in how for how in self.differing.values())
        )
        lines = [
            f"{'Verified' if self.ok else 'NOT verified'}: {same} of {self.n_tensors} tensors are "
            f"bit for bit what the recipe gives."
        ]
        if not lost:
            lines.append(
                f"{used} of {len(self.ingredients)} ingredients used, SHA-256 as recorded."
            )
        for title, found in (
            ("differs", self.differing),
            ("not checked", self.unchecked),
            ("ingredient", lost),
        ):
            lines += [f"{title}: {name!r} {how}" for name, how in list(found.items())[:5]]
            if len(found) > 5:
                lines.append(f"{title}: {len(found) - 5} more")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
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
        Held-out scores of single checkpoints by name, where the search ranked or knew them.
    temperature : float, default=1.0
        Learned-Soup's factor on the logits; never folded into the weights.
    recalibrated : tuple of str, default=()
        Tensors that were re-estimated from data and that `cook` can't rebuild.
    versions : dict of str to str
        Versions of sksoup, torch, ...
    classes : tuple, default=()
        Labels of the outputs, in their order, where JSON can hold them.

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
    classes: tuple[Any, ...] = ()

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
            Ingredient(
                name,
                checkpoints.sha256(name),
                path.name if path else None,
                checkpoints._key(name),
            )
            for name, path in paths.items()
        )
        names = layer_names or tuple(str(row) for row in range(len(rows)))
        return cls(method, ingredients, rows, dict(layers), names, **fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

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
            recipe = cls(
                method=str(document["method"]),
                ingredients=tuple(
                    Ingredient(i["name"], i["sha256"], i.get("file"), i.get("key"))
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
                classes=tuple(document.get("classes", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"{source} is not a whole sksoup recipe: {error!r}.") from error
        recipe._check(source)
        return recipe

    def _check(self, source: str) -> None:
        """Refuse what someone has edited or damaged."""
        rows, names = self.layers.values(), [i.name for i in self.ingredients]
        try:
            check_coef(self.coef, len(names))
        except ValueError as error:
            raise RecipeError(f"{source} is not a whole sksoup recipe: {error}") from error
        wrong = None
        if self.coef.ndim != 2 or len(self.coef) != len(self.layer_names):
            wrong = f"coef has shape {self.coef.shape} for {len(self.layer_names)} layers"
        elif rows and not (min(rows) >= 0 and max(rows) < len(self.coef)):
            wrong = f"layers name row {max(rows)} of {len(self.coef)}"
        elif len(set(names)) < len(names):
            wrong = "two ingredients have the same name"
        if wrong is not None:
            raise RecipeError(f"{source} is not a whole sksoup recipe: {wrong}.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a soup's ``.safetensors`` file or folder, or from a ``.json`` file.

        Parameters
        ----------
        path : str or path-like
            Where `save`, ``soup.save``, ``soup.save_pretrained`` or ``cook(out=...)`` wrote it.

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
        is_text = where.suffix != ".safetensors" and not where.name.endswith(INDEX)
        if is_text and not where.is_dir():
            try:
                text = where.read_text(encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"{str(where)!r} can't be read: {error}.") from error
            except UnicodeDecodeError as error:
                raise RecipeError(
                    f"{str(where)!r} holds no sksoup recipe: expected a .safetensors file or a "
                    f"folder that sksoup wrote, or a .json file."
                ) from error
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

    def is_used(self) -> NDArray[np.bool_]:
        """Tell which checkpoints are in the soup.

        Returns
        -------
        used : ndarray of shape (n_checkpoints,), bool
            Whether any coefficient of a checkpoint is other than 0.
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
            with coefficient 0 throughout may be missing. More checkpoints do no harm.
        out : str or path-like, default=None
            A new folder to write the weights to, in shards that carry this recipe, for models
            larger than memory (see `mix`).

        Returns
        -------
        state_dict : dict of str to Tensor, or Path
            As ``soup.state_dict()``, `recalibrated` tensors excepted (they are mixed). With
            ``out``, the path of that folder.

        Raises
        ------
        RecipeError
            An ingredient is missing, or its contents are not those the soup was made of.

        Notes
        -----
        Reads each used file twice: once for its hash, once to mix.
        """
        chosen, coef = self._used(checkpoints)
        if out is None:
            return mix(chosen, coef, layers=self.layers)
        rows = check_layers(self.layers, chosen.layout, len(coef))
        return mix_into(Path(out), chosen, coef, rows, {METADATA_KEY: self.to_json()})

    def verify(
        self,
        weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
        checkpoints: CheckpointCollection | Any,
    ) -> Verification:
        """Rebuild a soup tensor by tensor and compare it bit for bit.

        Parameters
        ----------
        weights : mapping of str to Tensor, or path
            The soup: a state dict, a file, or a folder of shards.
        checkpoints : CheckpointCollection
            Or anything its constructor takes: the ingredients.

        Returns
        -------
        findings : Verification
            What differs, what can't be checked, and which ingredients are not those recorded.

        Raises
        ------
        CheckpointError
            A file can't be read.

        Notes
        -----
        Reads each used file twice. Memory: a few tensors.

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
        if not isinstance(checkpoints, CheckpointCollection):
            checkpoints = CheckpointCollection(checkpoints)
        ingredients = {}
        for ingredient, used in zip(self.ingredients, self.is_used(), strict=True):
            ingredients[ingredient.name] = "ok" if used else "unused"
            try:
                if used:
                    self._find(ingredient, checkpoints)
            except RecipeError as error:
                ingredients[ingredient.name] = str(error)
        unchecked = dict.fromkeys(
            self.recalibrated, "was re-estimated from data, which no recipe can rebuild"
        )
        if set(ingredients.values()) - {"ok", "unused"}:
            lost = dict.fromkeys(self.layers, "can't be rebuilt without all its ingredients")
            return Verification({}, lost | unchecked, ingredients, len(self.layers))
        chosen, coef = self._used(checkpoints)
        rows = check_layers(self.layers, chosen.layout, len(coef))
        differing = {}
        with _reading(weights) as (header, read):
            differing.update({n: "is not in the recipe" for n in header if n not in self.layers})
            differing.update({n: "is missing" for n in self.layers if n not in header})
            names = [n for n in self.layers if n in header and n not in unchecked]
            for name, expected in mix_some(chosen, coef, rows, names):
                if how := _difference(header[name], expected, read(name)):
                    differing[name] = how
        return Verification(differing, unchecked, ingredients, len(self.layers))

    def to_card(self) -> str:
        """Describe the soup in words, as a Hugging Face–style model card.

        Returns
        -------
        card : str
            Markdown with YAML front matter. Names of checkpoints are escaped.
        """
        used = self.is_used()
        mean = self.coef.mean(axis=0)
        rows = [
            f"| {_plain(i.name)} | {c:.4f} | {_score(self.scores.get(i.name))} | `{i.sha256}` |"
            for i, c, u in zip(self.ingredients, mean, used, strict=True)
            if u
        ]
        layers = f"mean over {len(self.coef)} layers" if len(self.coef) > 1 else "of the network"
        lines = [
            "---",
            "tags:",
            "- model-soup",
            "- merge",
            "- sksoup",
            "---",
            "",
            f"# {_plain(self.method)} of {len(rows)} checkpoint{'s' * (len(rows) > 1)}",
            "",
            f"One network mixed from {len(rows)} of {len(self.ingredients)} checkpoints that were "
            f"fine-tuned from one start, by `{_plain(self.method)}` of sksoup: its weights are "
            f"their sum with the coefficients below, which sum to 1. It costs no more to run than "
            f"any one of them.",
            "",
            f"| ingredient | coefficient ({layers}) | held-out score | SHA-256 |",
            "| --- | ---: | ---: | --- |",
            *rows,
            "",
        ]
        if self.classes:
            labels = ", ".join(f"`{_plain(str(label))}`" for label in self.classes)
            lines += [f"Outputs, in order: {labels}.", ""]
        if self.temperature != 1.0:
            lines += [f"Multiply the logits by {self.temperature:.6g} for probabilities.", ""]
        if self.recalibrated:
            lines += [f"{len(self.recalibrated)} tensors were re-estimated from data.", ""]
        lines += [
            "The exact coefficients are in the file's metadata. With the ingredients at hand, "
            "rebuild and compare the weights bit for bit:",
            "",
            "```",
            "python -m sksoup verify FILE FOLDER_OF_INGREDIENTS",
            "```",
            "",
            "Parameters: " + _listed(self.params) + ".",
            "",
            "Versions: " + _listed(self.versions) + ".",
            "",
        ]
        return "\n".join(lines)

    def _used(
        self, checkpoints: CheckpointCollection | Any
    ) -> tuple[CheckpointCollection, NDArray[np.float64]]:
        """The ingredients with a coefficient other than 0, and those coefficients."""
        if not isinstance(checkpoints, CheckpointCollection):
            checkpoints = CheckpointCollection(checkpoints)
        used = np.flatnonzero(self.is_used())
        needed = [self.ingredients[k] for k in used]
        found = {one.name: self._find(one, checkpoints) for one in needed}
        chosen = checkpoints._aliased(found)._named_as(self.layers)
        if unlike := sorted(chosen.layout.keys() ^ self.layers.keys()):
            raise RecipeError(
                f"The checkpoints hold other tensors than the recipe: {unlike[0]!r} is in one of "
                f"them only, and so are {len(unlike) - 1} more of {len(self.layers)}. Open them "
                f"as for the fit, with its module or prefix: CheckpointCollection(..., module=, "
                f"prefix=); --prefix on the command line."
            )
        return chosen, self.coef[:, used]

    def _find(self, ingredient: Ingredient, checkpoints: CheckpointCollection) -> str:
        # an ingredient that lived in memory is known by its values, whatever holds them now
        digest = checkpoints.sha256 if ingredient.file else checkpoints.content_sha256
        name = ingredient.name
        if name in checkpoints:
            if digest(name) == ingredient.sha256:
                return _with_key(name, ingredient, checkpoints)
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
        return _with_key(match, ingredient, checkpoints)


def _with_key(name: str, ingredient: Ingredient, checkpoints: CheckpointCollection) -> str:
    """The name, if it is that state dict of the container that the recipe was made of."""
    key = checkpoints._key(name)
    if None not in (key, ingredient.key) and key != ingredient.key:
        raise RecipeError(
            f"The recipe was made of key={ingredient.key!r} of {name!r}, and the checkpoints were "
            f"opened with key={key!r}."
        )
    return name


@contextmanager
def _reading(
    weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
) -> Iterator[tuple[dict[str, TensorInfo], Read]]:
    """Header and reader of a state dict, a file or a folder."""
    if isinstance(weights, Mapping):
        yield (
            {n: TensorInfo(tuple(v.shape), v.dtype) for n, v in weights.items()},
            weights.__getitem__,
        )
        return
    opened = open_weights(Path(weights))
    with opened.open() as read:
        yield opened.header, read


def _difference(info: TensorInfo, expected: torch.Tensor, given: torch.Tensor) -> str | None:
    if info != (wanted := TensorInfo(tuple(expected.shape), expected.dtype)):
        return f"is {info.dtype} of shape {info.shape}, expected {wanted.dtype} of {wanted.shape}"
    return None if same_bits(expected, given.cpu()) else "has other values"


def _plain(text: str) -> str:
    """Text that can't break out of a cell of a Markdown table, or into HTML."""
    safe = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#~!" else c for c in safe)


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(name)} = {_plain(str(v))}" for name, v in values.items()) or "none"
