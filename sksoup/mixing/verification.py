"""Compare the weights of a soup bit for bit with those rebuilt from its recipe."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.architecture import ModuleSource
from ..checkpoints.beside import other_weights
from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.converted import open_alike
from ..checkpoints.hub_companions import model_folders
from ..checkpoints.hub_config import refuse_other_weights
from ..checkpoints.modules import WEIGHTS
from ..checkpoints.peft_config import adapter_folder, is_adapter_folder
from ..checkpoints.protocol import Read, TensorInfo, same_bits
from ..checkpoints.read import real_path
from ..checkpoints.shards import INDEX
from ..checkpoints.sources import open_checkpoint, paths_of
from ..checkpoints.torch_files import TorchFile
from ..exceptions import RecipeError
from ..runtime.fingerprint import tensor_bytes
from .ingredients import check_base, find_ingredient, select_ingredients
from .layers import check_layers, is_statistic
from .mix import as_dtype, mix_some, stored_dtypes
from .rounding import Opened, is_rounding

READ = (".json", *WEIGHTS)  # files of a checkpoint's folder
LIMITS = (
    "Scores, temperature, labels and versions can't be rebuilt.\n"
    "A SHA-256 shows accidental changes; it is not a signature."
)


@dataclass(frozen=True)
class Verification:
    """Result of `Recipe.verify`. Print it for a summary.

    Parameters
    ----------
    differing : dict of str to str
        Tensors of the soup that differ from those rebuilt from its recipe, and how they differ.
    unchecked : dict of str to str
        Tensors that could not be rebuilt, and the reason.
    ingredients : dict of str to str
        For every checkpoint in the recipe, ``"ok"``, ``"unused"`` or the problem.
    n_tensors : int
        Number of tensors in the recipe.
    sha256 : str, default="not recorded"
        ``"ok"`` or ``"differs"``, for the SHA-256 of the soup's tensors (including those in
        ``unchecked``) compared with that in the recipe; ``"not recorded"`` if the recipe has none.
    rounded : tuple of str, default=()
        Tensors with LoRA factors that differ only by rounding, because the last bit of matrix
        products depends on the processor.
    beside : tuple of str, default=()
        Other weights in the soup's folder, which were not compared but which a program may load
        from it.

    Examples
    --------
    >>> from sksoup.recipe import Verification
    >>> print(Verification({}, {}, {"a": "ok", "b": "unused"}, 4, "ok"))
    Verified: 4 of 4 tensors are bit for bit what the recipe gives.
    1 of 2 ingredients used, SHA-256 as recorded.
    SHA-256 of the tensors: as recorded.
    Scores, temperature, labels and versions can't be rebuilt.
    A SHA-256 shows accidental changes; it is not a signature.
    """

    differing: dict[str, str]
    unchecked: dict[str, str]
    ingredients: dict[str, str]
    n_tensors: int
    sha256: str = "not recorded"
    rounded: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the soup matches: a tensor was checked, and no tensor and no SHA-256 differs.

        There are also no other weights in the folder.
        """
        is_checked = len(self.unchecked) < self.n_tensors
        differs = self.differing or self.beside or self.sha256 == "differs"
        return is_checked and not differs

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as plain dicts.

        Returns
        -------
        findings : dict
            The fields and ``"ok"``, which can be converted to JSON.
        """
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lost = {n: state for n, state in self.ingredients.items() if state not in ("ok", "unused")}
        used = sum(state != "unused" for state in self.ingredients.values())
        wrong = sum("not in the recipe" not in how for how in self.differing.values())
        same = self.n_tensors - len(self.unchecked) - wrong - len(self.rounded)
        lines = [
            f"{'Verified' if self.ok else 'NOT verified'}: {same} of {self.n_tensors} tensors are "
            f"bit for bit what the recipe gives."
        ]
        if self.rounded:
            lines.append(
                f"{len(self.rounded)} more differ by rounding only: they are sums of products of "
                f"matrices."
            )
        n = len(self.ingredients)
        if not lost:
            lines.append(f"{used} of {n} ingredients used, SHA-256 as recorded.")
        beside = dict.fromkeys(self.beside, "is also in the folder, and other programs may load it")
        parts = {
            "differs": self.differing, "not compared": beside, "not checked": self.unchecked,
            "ingredient": lost,
        }  # fmt: skip
        for title, found in parts.items():
            lines += [f"{title}: {name!r} {how}" for name, how in list(found.items())[:5]]
            if len(found) > 5:
                lines.append(f"{title}: {len(found) - 5} more")
        states = {"ok": "as recorded", "not recorded": "not recorded, so it was not checked"}
        lines.append(f"SHA-256 of the tensors: {states.get(self.sha256, 'NOT as recorded')}.")
        return "\n".join([*lines, LIMITS])


def verify(
    recipe: Any,
    weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
    checkpoints: CheckpointCollection,
) -> Verification:
    """Rebuild the soup of a recipe tensor by tensor, and compare it with these weights."""
    before = _stamps(checkpoints)
    found = _compare(recipe, weights, checkpoints)
    after = _stamps(checkpoints)
    if changed := [name for name in before if before[name] != after.get(name)]:
        raise RecipeError(
            f"{changed[0]!r} changed while it was compared, or was replaced and put back. Verify "
            f"again when no other process writes to its folder."
        )
    return found


def _stamps(checkpoints: CheckpointCollection) -> dict[str, list[tuple[Any, ...]]]:
    """Inodes and change times of the files of checkpoints and bases; renaming changes them."""
    stamps: dict[str, list[tuple[Any, ...]]] = {}
    for path in paths_of(checkpoints, checkpoints.names):
        is_folder = path.is_dir() or path.name.endswith(INDEX)
        place = path.parent if path.name.endswith(INDEX) else path
        if str(place) not in stamps:
            files = [place]
            if is_folder:
                files = [one for one in sorted(place.iterdir()) if one.suffix in READ]
            stamps[str(place)] = [stamp for file in files for stamp in _stamp(file)]
    return stamps


def _stamp(file: Path) -> Iterator[tuple[Any, ...]]:
    """Name, inode, size and change time of a file; none if it is gone."""
    with suppress(OSError):
        found = file.stat()
        if stat.S_ISREG(found.st_mode):
            yield file.name, found.st_ino, found.st_size, found.st_ctime_ns


def _compare(
    recipe: Any,
    weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
    checkpoints: CheckpointCollection,
) -> Verification:
    ingredients, is_used = {}, recipe.is_used()
    names: list[str] = []
    for ingredient, used in zip(recipe.ingredients, is_used, strict=True):
        ingredients[ingredient.name] = "ok" if used else "unused"
        try:
            if used:
                names.append(find_ingredient(ingredient, checkpoints))
        except RecipeError as error:
            ingredients[ingredient.name] = str(error)
    beside = _beside(weights, checkpoints, names)
    statistics = [name for name in recipe.recalibrated if is_statistic(name)]
    unchecked = dict.fromkeys(
        statistics, "was re-estimated from data, which a recipe can't rebuild"
    )
    with _reading(weights, recipe.layers, checkpoints.module) as (header, read):
        digest = _compared(recipe.weights_sha256, header, read)
        if set(ingredients.values()) - {"ok", "unused"}:
            lost = dict.fromkeys(recipe.layers, "can't be rebuilt without all its ingredients")
            return Verification(
                {}, lost | unchecked, ingredients, len(recipe.layers), digest, beside=beside
            )
        chosen = select_ingredients(recipe.ingredients, is_used, recipe.layers, checkpoints)
        check_base(recipe.base, chosen)
        coef = recipe.coef[:, is_used]
        rows = check_layers(recipe.layers, chosen.layout, len(coef))
        differing = {n: "is not in the recipe" for n in header if n not in recipe.layers}
        differing |= {n: "is missing" for n in recipe.layers if n not in header}
        present = [n for n in recipe.layers if n in header]
        dtype = as_dtype(recipe.dtype)
        dtypes = stored_dtypes(chosen, coef, dtype)
        products = {n for one in chosen.adapters(chosen.names).values() for n in one.ranks}
        rounded: list[str] = []
        for name in unchecked.keys() & set(present):
            if how := _other_kind(
                header[name], TensorInfo(chosen.layout[name].shape, dtypes[name])
            ):
                differing[name] = how
        compared = [n for n in present if n not in unchecked]
        with Opened(chosen) as opened:
            for name, expected in mix_some(chosen, coef, rows, compared, dtype):
                info, value = header[name], read(name).cpu()
                if how := _other_kind(info, TensorInfo.of(expected)):
                    differing[name] = how
                elif same_bits(expected, value):
                    continue
                elif name in products and is_rounding(
                    name, expected, value, opened, coef[rows[name]]
                ):
                    rounded.append(name)
                else:
                    differing[name] = "has other values"
    return Verification(
        differing, unchecked, ingredients, len(recipe.layers), digest, tuple(rounded), beside
    )


def digest_of_tensors(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict: names, dtypes, shapes and bytes, as `verify` compares it."""
    with _reading(weights) as (header, read):
        return _digest(header, read)


def _digest(header: Mapping[str, TensorInfo], read: Read) -> str:
    digest = sha256()
    for name, info in sorted(header.items()):
        entry = json.dumps(
            [name, str(info.dtype), list(info.shape)]
        )  # JSON, so that its end is unambiguous
        digest.update(entry.encode())
        digest.update(tensor_bytes(read(name)))
    return digest.hexdigest()


def _compared(recorded: str | None, header: Mapping[str, TensorInfo], read: Read) -> str:
    if recorded is None:
        return "not recorded"
    return "ok" if _digest(header, read) == recorded else "differs"


@contextmanager
def _reading(
    weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
    names: Collection[str] = (),
    module: ModuleSource | None = None,
) -> Iterator[tuple[Mapping[str, TensorInfo], Read]]:
    """Header and reader of a state dict, a file or a folder, by the names of a module."""
    if isinstance(weights, Mapping):
        yield (
            {n: TensorInfo.of(value) for n, value in weights.items()},
            lambda name: weights[name].resolve_neg(),
        )
    else:
        path = Path(weights)
        _refuse_adapter(path)
        refuse_other_weights(path if path.is_dir() else path.parent)
        ways = open_alike(path, module), open_checkpoint(path)
        if isinstance(ways[1], TorchFile) and not ways[1].is_plain:
            raise RecipeError(
                f"{str(path)!r} holds more than a plain state dict, so other programs may read "
                f"other weights from it, expected a file written by soup.save."
            )
        opened = max(ways, key=lambda way: len(way.header.keys() & set(names)))
        # other versions of transformers may read what this one computes
        unread = getattr(opened, "unread", {})
        with opened.open() as read, ways[1].open() as read_stored:
            yield (
                {**opened.header, **unread},
                lambda name: read_stored(name) if name in unread else read(name),
            )


def _refuse_adapter(path: Path) -> None:
    """Raise an error for the factors of an adapter, which are not the weights of a model."""
    if adapter_folder(path) is not None:
        raise RecipeError(
            f"{str(path)!r} is a PEFT adapter, which can't be verified, because its base is part "
            f"of the model. Verify soup.state_dict(), or the output of soup.save or "
            f"save_pretrained."
        )


def _beside(
    weights: Any, checkpoints: CheckpointCollection, ingredients: Collection[str]
) -> tuple[str, ...]:
    """Weights that a program may load instead of, or in addition to, those compared."""
    if isinstance(weights, Mapping):
        return ()
    path = Path(weights)
    if not path.exists() or is_adapter_folder(path):  # the error is raised when it is opened
        return ()
    own = real_path(path if path.is_dir() else path.parent)  # maybe one of the ingredients
    folders = [one for one in model_folders(checkpoints, ingredients) if real_path(one) != own]
    return tuple(other_weights(path, folders))


def _other_kind(info: TensorInfo, wanted: TensorInfo) -> str | None:
    if info == wanted:
        return None
    return f"is {info.dtype} of shape {info.shape}, expected {wanted.dtype} of {wanted.shape}"
