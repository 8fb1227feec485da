"""The commands that need checkpoints only: inspect, average, stock, cook, verify."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .. import __version__
from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.prefixes import PREFIXES
from ..checkpoints.protocol import Read
from ..checkpoints.survey import MORE, judge, judge_soups
from ..exceptions import CheckpointError, RecipeError, SoupWarning
from ..mixing.layers import Layers, group_layers
from ..mixing.recipe import Recipe
from ..mixing.stock import stock_coef, stock_ratios
from ..recipes.start import name_of_start, with_start
from .output import write_mix

Result: TypeAlias = tuple[bool, dict[str, Any], str]  # whether a check failed; JSON; text
MOST_NAMES = 20  # in an error about their order


def inspect(options: argparse.Namespace) -> Result:
    """Compare checkpoints."""
    with opened(options) as collection:
        summary = collection.describe()
    bad = any(row.problem for row in summary.checkpoints)
    return bad, summary.to_dict(), str(summary)


def average(options: argparse.Namespace) -> Result:
    """Average checkpoints, with equal or given weights."""
    with opened(options) as collection:
        coef = _weights(options.weights, collection.names)[None]
        layers = Layers(("all",), dict.fromkeys(collection.layout, 0), ())
        done = _write(options, _recorded("average", options, collection, coef, layers), collection)
        _warn_of(collection)
        return done


def stock(options: argparse.Namespace) -> Result:
    """Mix the mean with the pretrained start, by the angle of the fine-tunings."""
    with opened(options) as tuned:
        collection = with_start(tuned, options.start)
        start = name_of_start(tuned, options.start)
        layers = group_layers(collection.layout, collection.layout, layerwise=True)
        weights = [name for name in layers.names if name in collection.layout]
        ratios, _ = stock_ratios(collection, start, layers, weights, _warn)
        coef = layers.expand(stock_coef(collection, start, ratios))
        done = _write(options, _recorded("stock", options, collection, coef, layers), collection)
        _warn_of(collection)
        return done


def cook(options: argparse.Namespace) -> Result:
    """Rebuild a soup from its recipe."""
    recipe = _recipe(options)
    with opened(options, recipe=recipe) as collection:
        return _write(options, recipe, collection)


def verify(options: argparse.Namespace) -> Result:
    """Compare a soup with what its recipe gives."""
    recipe = _recipe(options)
    with opened(options, recipe=recipe) as collection:
        findings = recipe.verify(options.recipe, collection)
    return not findings.ok, findings.to_dict(), str(findings)


def _weights(given: list[float] | None, names: tuple[str, ...]) -> NDArray[np.float64]:
    """The coefficients as given, in the order of the checkpoints, or equal ones."""
    if given is None:
        return np.full(len(names), 1 / len(names))
    coef = np.array(given)
    if len(coef) != len(names) or not np.isfinite(coef).all() or abs(coef.sum() - 1) > 1e-6:
        order = ", ".join(map(repr, names[:MOST_NAMES]))
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        remedy = ""
        if len(coef) != len(names):
            got = f"{len(coef)} number{'s' * (len(coef) > 1)}, expected {len(names)}"
        elif not np.isfinite(coef).all():
            got = "NaN or infinite values, expected finite numbers"
        else:
            got = f"numbers whose sum is {coef.sum():.6g}, expected 1"
            if coef.sum() > 0:
                divided = " ".join(f"{c:.6g}" for c in coef / coef.sum())
                remedy = f" Divided by their sum: --weights {divided}"
        raise ValueError(
            f"--weights has {got}. One number per checkpoint is needed, in this order: "
            f"{order}{more}.{remedy}"
        )
    return coef


def _warn_of(collection: CheckpointCollection) -> None:
    """Warn if what was mixed, and so read, does not look fine-tuned from one start, or is mixed."""
    relations = collection.relations(collection.names)
    if relations.unrelated:
        _warn(f"{judge(relations)} {MORE}")
    if said := judge_soups(collection.soups(), len(collection)):
        _warn(said)


def _warn(message: str) -> None:
    warnings.warn(message, SoupWarning, stacklevel=2)


def _recorded(
    method: str,
    options: argparse.Namespace,
    collection: CheckpointCollection,
    coef: NDArray[np.float64],
    layers: Layers,
) -> Recipe:
    return Recipe.record(
        method, collection, coef, layers=layers.rows, layer_names=layers.names,
        versions={"sksoup": __version__, "torch": torch.__version__}, dtype=options.dtype,
    )  # fmt: skip


def _write(options: argparse.Namespace, recipe: Recipe, collection: CheckpointCollection) -> Result:
    remark = write_mix(options, recipe, collection)
    output, n = str(Path(options.output)), int(recipe.is_used().sum())
    done = {"output": output, "ingredients": n, "recalibrated": list(recipe.recalibrated)}
    text = f"{output}: {n} checkpoint{'s' * (n > 1)} mixed"
    if recipe.dtype is not None:
        text += f", in {recipe.dtype}"
    text += remark
    kept = [p for p in PREFIXES if all(name.startswith(p) for name in recipe.layers)]
    if kept and collection.module is None:  # else these are the names of the network
        text += f"; all names begin with {kept[0]!r}, as in the files: --prefix {kept[0]} drops it"
    if recipe.recalibrated:
        text += (
            f"; {len(recipe.recalibrated)} tensors were re-estimated from data in the original and "
            f"are mixed here"
        )
    return False, done, text


def _recipe(options: argparse.Namespace) -> Recipe:
    try:
        return Recipe.load(options.recipe)
    except (CheckpointError, RecipeError) as error:
        raise RecipeError(f"{error} The recipe is the first argument.") from error


class _Watched(CheckpointCollection):
    """A collection that reports the bytes of every tensor that is read."""

    report: Callable[[int], object]

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        with super().open(name) as read:

            def read_and_report(tensor: str) -> torch.Tensor:
                value = read(tensor)
                self.report(value.nbytes)
                return value

            yield read_and_report


@contextmanager
def opened(
    options: argparse.Namespace, recipe: Recipe | None = None
) -> Iterator[CheckpointCollection]:
    """Open the checkpoints, with a progress bar on a terminal (and nothing elsewhere)."""
    given = [] if recipe is None else [(one.key, one.prefix) for one in recipe.ingredients]
    key, prefix = given[0] if len(set(given)) == 1 else (None, None)
    collection = _Watched.from_path(
        options.sources, which=options.which, module=options.base, key=options.key or key,
        prefix=options.prefix or prefix,
    )  # fmt: skip
    is_chosen = getattr(options, "healthy", False)  # which takes a read of all
    total = len(collection) * collection.nbytes * (2 if is_chosen else 1)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        collection.report = bar.update
        yield collection.healthy() if is_chosen else collection
