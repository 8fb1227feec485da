"""Work on folders of checkpoints from the command line: what needs no held-out data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import __version__
from ._describe import UNRELATED
from ._formats import Read
from .checkpoints import CheckpointCollection
from .exceptions import CheckpointError, RecipeError
from .recipe import Recipe

EPILOG = """\
Exit status: 0 fine; 1 a check failed (inspect: unrelated checkpoints, verify: another soup);
2 nothing was done, and why is said. Checkpoints are never unpickled unsafely.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(argv)
    try:
        if "output" in options:
            _check_output(Path(options.output), options.force)
        status, document, text = options.run(options)
    except (CheckpointError, RecipeError, OSError) as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"sksoup: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document, indent=1, allow_nan=False) if options.json else text)
    return int(status)


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {
        "epilog": EPILOG,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(
        prog="sksoup", description="Mix checkpoints, without held-out data.", **shape
    )
    parser.add_argument("--version", action="version", version=f"sksoup {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, first, summary in (
        (_inspect, None, "Compare checkpoints: do they belong together?"),
        (_average, None, "Average checkpoints with equal coefficients."),
        (_cook, "RECIPE", "Rebuild a soup from its recipe (.json, or a soup that carries one)."),
        (_verify, "FILE", "Check that a soup (a file or a folder) is what its recipe gives."),
    ):
        name = run.__name__.strip("_")
        command = commands.add_parser(name, help=summary, description=summary, **shape)
        command.set_defaults(run=run)
        if first is not None:
            command.add_argument("recipe", metavar=first, help="where the recipe is")
        command.add_argument("source", metavar="DIR", help="a folder, quoted pattern, or file")
        command.add_argument("--key", help="which state dict of containers that hold several")
        command.add_argument("--json", action="store_true", help="print JSON, errors too")
        if run in (_average, _cook):
            command.add_argument(
                "-o",
                "--output",
                required=True,
                metavar="FILE",
                help="a .safetensors file; or a new folder, for models larger than memory",
            )
            command.add_argument("--force", action="store_true", help="replace an existing file")
    return parser


# ------------------------------------------------------------------------------- commands


def _inspect(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    with _opened(options, passes=2) as collection:
        summary = collection.describe()
    unrelated = any(row.cosine < UNRELATED for row in summary.checkpoints)
    return unrelated, summary.to_dict(), str(summary)


def _average(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    with _opened(options) as collection:
        n = len(collection)
        recipe = Recipe.record(
            "average",
            collection,
            np.full((1, n), 1 / n),
            layers=dict.fromkeys(collection.layout, 0),
            layer_names=("all",),
            versions={"sksoup": __version__, "torch": torch.__version__},
        )
        return _write(options, recipe, collection)


def _cook(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    recipe = Recipe.load(options.recipe)
    with _opened(options) as collection:
        return _write(options, recipe, collection)


def _write(
    options: argparse.Namespace, recipe: Recipe, collection: CheckpointCollection
) -> tuple[bool, dict[str, Any], str]:
    output, n = Path(options.output), int(recipe.is_used().sum())
    if output.suffix == ".safetensors":
        recipe.save_weights(output, recipe.cook(collection))
    else:
        recipe.cook(collection, out=output)
    done = {"output": str(output), "ingredients": n, "recalibrated": list(recipe.recalibrated)}
    text = f"{output}: {n} checkpoints mixed"
    if recipe.recalibrated:
        text += (
            f"; {len(recipe.recalibrated)} tensors were re-estimated from data in the original and "
            f"are mixed here"
        )
    return False, done, text


def _verify(options: argparse.Namespace) -> tuple[bool, dict[str, Any], str]:
    recipe = Recipe.load(options.recipe)
    with _opened(options) as collection:
        findings = recipe.verify(options.recipe, collection)
    return not findings.ok, findings.to_dict(), str(findings)


# --------------------------------------------------------------------------------- helpers


def _check_output(output: Path, force: bool) -> None:
    """Refuse, before any work, what could not be written at its end."""
    if output.suffix == ".safetensors":
        if output.exists() and not force:
            raise FileExistsError(f"{str(output)!r} exists. Give another name, or --force.")
    elif output.suffix:
        raise CheckpointError(
            f"{str(output)!r} can't be written: got the suffix {output.suffix!r}, expected "
            f".safetensors, or a folder."
        )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{str(output)!r} exists and is not an empty folder. Give another name, or move it "
            f"away: --force replaces files only."
        )
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{str(output)!r} can't be written: the folder {str(output.parent)!r} does not exist."
        )


class _Watched(CheckpointCollection):
    """A collection that tells of every byte read."""

    tell: Callable[[int], object]

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        with super().open(name) as read:

            def read_and_tell(tensor: str) -> torch.Tensor:
                value = read(tensor)
                self.tell(value.nbytes)
                return value

            yield read_and_tell


@contextmanager
def _opened(options: argparse.Namespace, passes: int = 1) -> Iterator[CheckpointCollection]:
    """Open the checkpoints, with a progress bar on a terminal (and nothing elsewhere)."""
    collection = _Watched.from_path(options.source, key=options.key)
    total = passes * len(collection) * collection.nbytes
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        collection.tell = bar.update
        yield collection


if __name__ == "__main__":
    sys.exit(main())
