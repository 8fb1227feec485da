"""Work on folders of checkpoints from the command line: what needs no held-out data."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from tqdm import tqdm

from . import __version__
from .checkpoints.collection import CheckpointCollection
from .checkpoints.prefixes import PREFIXES
from .checkpoints.protocol import Read
from .checkpoints.sources import SUFFIXES
from .exceptions import CheckpointError, RecipeError
from .mixing.layers import Layers, group_layers
from .mixing.recipe import Recipe
from .mixing.stock import stock_coef, stock_ratios
from .tables import printable

EPILOG = """\
Exit status: 0 fine; 1 a check failed (inspect: bad or unrelated checkpoints, verify: another soup);
2 an error, with its reason; nothing was written. Checkpoints are never unpickled unsafely.
verify rebuilds the tensors from the checkpoints. A SHA-256 is no signature: it shows accidents.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(argv)
    try:
        if "output" in options:
            _check_output(Path(options.output), options.force)
        status, document, text = options.run(options)
    except (ValueError, OSError, SafetensorError) as error:  # ours are ValueErrors
        said = "\n".join([str(error), *getattr(error, "__notes__", ())])
        if options.json:
            print(json.dumps({"error": said}))
        else:
            print(f"sksoup: {_shown(said)}", file=sys.stderr)
        return 2
    print(json.dumps(document, indent=1, allow_nan=False) if options.json else _shown(text))
    return int(status)


def _shown(text: str) -> str:
    """Lines for a terminal, which obeys escape sequences in names of files and tensors."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _parser() -> argparse.ArgumentParser:
    shape: Any = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="sksoup", description="Mix checkpoints, without held-out data.", **shape
    )
    parser.add_argument("--version", action="version", version=f"sksoup {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, first, summary in (
        (_inspect, None, "Compare checkpoints: do they belong together?"),
        (_average, None, "Average checkpoints with equal coefficients."),
        (_stock, None, "Mix their mean with the pretrained start, by Model Stock's rule."),
        (_cook, "RECIPE", "Rebuild a soup from its recipe (.json, or a soup that carries one)."),
        (_verify, "FILE", "Check that a soup (a file or a folder) is what its recipe gives."),
    ):
        command = commands.add_parser(
            run.__name__.strip("_"), help=summary, description=summary, **shape
        )
        command.set_defaults(run=run)
        if first is not None:
            command.add_argument("recipe", metavar=first, help="where the recipe is")
        command.add_argument(
            "sources", metavar="PATH", nargs="+", help="a folder, a sweep, quoted pattern, or file"
        )
        command.add_argument("--key", help="which state dict of containers that hold several")
        command.add_argument(
            "--prefix", help="take only names that begin with this, and leave it out"
        )
        command.add_argument(
            "--base", metavar="FOLDER",
            help="the Hugging Face folder that LoRA adapters add to (default: as they name it)",
        )  # fmt: skip
        command.add_argument(
            "--which", choices=("best", "last", "all"),
            help="which checkpoint of each run (default: best of a sweep's, all of one run)",
        )  # fmt: skip
        command.add_argument("--json", action="store_true", help="print JSON, errors too")
        if run is _stock:
            command.add_argument(
                "--start", metavar="PATH", required=True,
                help="the checkpoint that all were fine-tuned from: a file or a folder",
            )  # fmt: skip
        if run in (_average, _stock, _cook):
            where = "a .safetensors file; or a new folder, for models larger than memory"
            command.add_argument("-o", "--output", required=True, metavar="FILE", help=where)
            command.add_argument("--force", action="store_true", help="replace an existing file")
    return parser


def _inspect(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    with _opened(options) as collection:
        summary = collection.describe()
    bad = any(row.problem for row in summary.checkpoints)
    return bad, summary.to_dict(), str(summary)


def _average(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    with _opened(options) as collection:
        coef = np.full((1, len(collection)), 1 / len(collection))
        layers = Layers(("all",), dict.fromkeys(collection.layout, 0), ())
        return _write(options, _recorded("average", collection, coef, layers), collection)


def _stock(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    with _opened(options) as tuned:
        collection = tuned.add("start", options.start)
        layers = group_layers(collection.layout, collection.layout, layerwise=True)
        weights = [name for name in layers.names if name in collection.layout]
        ratios, _ = stock_ratios(collection, "start", layers, weights)
        coef = layers.expand(stock_coef(collection, "start", ratios))
        return _write(options, _recorded("stock", collection, coef, layers), collection)


def _recorded(
    method: str, collection: CheckpointCollection, coef: NDArray[np.float64], layers: Layers
) -> Recipe:
    return Recipe.record(
        method, collection, coef, layers=layers.rows, layer_names=layers.names,
        versions={"sksoup": __version__, "torch": torch.__version__},
    )  # fmt: skip


def _cook(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    recipe = _recipe(options)
    with _opened(options, recipe=recipe) as collection:
        return _write(options, recipe, collection)


def _write(
    options: argparse.Namespace, recipe: Recipe, collection: CheckpointCollection
) -> tuple[bool, dict[str, Any], str]:
    output, n = Path(options.output), int(recipe.is_used().sum())
    mixed = [one.name for one in recipe.ingredients if one.name in collection]
    sources = [path.resolve() for path in map(collection.path, mixed) if path]
    if {output.resolve(), output.resolve().parent} & set(sources):  # with --force
        raise FileExistsError(
            f"{options.output!r} is one of the checkpoints to be mixed. Give another name, or move "
            f"it away first."
        )
    if output.suffix == ".safetensors":
        cooked = recipe.cook(collection)
        replace(recipe, recalibrated=()).save_weights(output, cooked)
    else:
        recipe.cook(collection, out=output)
    done = {"output": str(output), "ingredients": n, "recalibrated": list(recipe.recalibrated)}
    text = f"{output}: {n} checkpoint{'s' * (n > 1)} mixed"
    if kept := [p for p in PREFIXES if all(name.startswith(p) for name in recipe.layers)]:
        text += f"; all names begin with {kept[0]!r}, as in the files: --prefix {kept[0]} drops it"
    if recipe.recalibrated:
        text += (
            f"; {len(recipe.recalibrated)} tensors were re-estimated from data in the original and "
            f"are mixed here"
        )
    return False, done, text


def _verify(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    recipe = _recipe(options)
    with _opened(options, recipe=recipe) as collection:
        findings = recipe.verify(options.recipe, collection)
    return not findings.ok, findings.to_dict(), str(findings)


def _check_output(output: Path, force: bool) -> None:
    """Refuse, before any work, what could not be written at its end."""
    if output.suffix == ".safetensors":
        if os.path.lexists(output) and not force:  # also a link to nothing
            raise FileExistsError(f"{str(output)!r} exists. Give another name, or --force.")
    elif output.suffix in (*SUFFIXES, ".json"):  # other dots are those of a folder's name
        raise CheckpointError(
            f"{str(output)!r} can't be written: got the suffix {output.suffix!r}, expected "
            f".safetensors, or a folder."
        )
    elif os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{str(output)!r} exists and is not an empty folder. Give another name, or move it "
            f"away: --force replaces files only."
        )
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{str(output)!r} can't be written: the folder {str(output.parent)!r} does not exist."
        )


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
def _opened(
    options: argparse.Namespace, recipe: Recipe | None = None
) -> Iterator[CheckpointCollection]:
    """Open the checkpoints, with a progress bar on a terminal (and nothing elsewhere)."""
    keys = set() if recipe is None else {one.key for one in recipe.ingredients}
    key = keys.pop() if options.key is None and len(keys) == 1 else options.key
    collection = _Watched.from_path(
        options.sources, which=options.which, module=options.base, key=key, prefix=options.prefix
    )
    total = len(collection) * collection.nbytes
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        collection.report = bar.update
        yield collection


if __name__ == "__main__":
    sys.exit(main())
