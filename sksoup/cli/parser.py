"""The options of every command, and its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import __version__
from . import options, search, weights
from .examples import EXAMPLES

DESCRIPTION = (
    "Mix checkpoints that were fine-tuned from one pretrained start into one model, and check what "
    "was mixed. `sksoup COMMAND --help` lists the options of a command, with examples."
)
EPILOG = """\
exit status:
  0  success
  1  a check failed (inspect: unusable or unrelated checkpoints; verify: the soup differs)
  2  usage or input error (message on stderr); nothing was written

No code in a pickle is run.
"""

MIXED = (options.output_of_dtype, options.report)
FITTED = (options.chosen_checkpoints, options.data, options.network)
WRITTEN = (options.output, options.report)


@dataclass(frozen=True)
class Command:
    """A command: what runs it, its usage, a line and a paragraph about it, and its options."""

    run: Callable[[argparse.Namespace], weights.Result]
    usage: str
    summary: str
    description: str
    groups: tuple[Callable[[argparse.ArgumentParser], Any], ...]


def build_parser() -> argparse.ArgumentParser:
    """The parser of `sksoup`, with a parser for each command."""
    shape: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog="sksoup", description=_filled(DESCRIPTION), epilog=EPILOG, **shape
    )
    parser.add_argument(
        "--version", action="version", version=f"sksoup {__version__}",
        help="print the version and exit",
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        examples = "\n".join(f"  {line}" for line in EXAMPLES[name])
        one = commands.add_parser(
            name, help=command.summary, usage=f"%(prog)s {command.usage} [options]",
            description=_filled(command.description),
            epilog=f"examples:\n{examples}", **shape,
        )  # fmt: skip
        one.set_defaults(run=command.run, command=name)
        for add in command.groups:
            add(one)
    return parser


def _filled(text: str, width: int = 88) -> str:
    """A paragraph in lines, which the formatter leaves as they are."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


COMMANDS = {
    "inspect": Command(
        weights.inspect,
        "PATH [PATH ...]",
        "check whether checkpoints can be mixed",
        "Compare checkpoints: which differ in what, whether they look fine-tuned from one start, "
        "and which can't be used. Needs no data.",
        (options.checkpoints, options.report),
    ),
    "average": Command(
        weights.average,
        "PATH [PATH ...] -o OUT",
        "average checkpoints, with equal or given weights",
        "Average the weights of checkpoints. Needs no data.",
        (options.chosen_checkpoints, options.average, *MIXED),
    ),
    "stock": Command(
        weights.stock,
        "PATH [PATH ...] --start PATH -o OUT",
        "mix the mean with the pretrained start (Model Stock)",
        "Mix the mean of the checkpoints with the pretrained start, by the angle between the "
        "fine-tunings in each layer (Model Stock). Needs no data.",
        (options.chosen_checkpoints, options.stock, *MIXED),
    ),
    "greedy": Command(
        search.search,
        "PATH [PATH ...] --data FILE -o OUT",
        "average the checkpoints that help on validation data (Greedy-Soup)",
        "Add checkpoints to an average one by one, best first, and keep those that do not lower "
        "the score on validation data (Greedy-Soup). Needs no gradients, and takes any metric.",
        (*FITTED, options.greedy, *WRITTEN),
    ),
    "learned": Command(
        search.search,
        "PATH [PATH ...] --data FILE -o OUT",
        "learn coefficients between 0 and 1 on validation data (Learned-Soup)",
        "Learn coefficients between 0 and 1 on validation data, with all checkpoints in memory "
        "(Learned-Soup).",
        (*FITTED, options.learned, *WRITTEN),
    ),
    "mehl": Command(
        search.search,
        "PATH [PATH ...] --data FILE -o OUT",
        "learn coefficients on validation data, in little memory (MEHL-Soup)",
        "Learn coefficients, which may be negative or larger than 1, on validation data, with as "
        "many checkpoints in memory as fit (MEHL-Soup): one per checkpoint, or with --layerwise "
        "one per checkpoint and layer, for 50 validation examples or more.",
        (*FITTED, options.mehl, *WRITTEN),
    ),
    "compare": Command(
        search.compare,
        "PATH [PATH ...] --data FILE --test FILE",
        "compare methods on validation and test data",
        "Fit the methods on the validation data and print a table of their scores on the "
        "validation and test data, and of their cost. No soup is written.",
        (
            options.chosen_checkpoints,
            options.data_and_test,
            options.network,
            options.compare,
            options.report,
        ),
    ),
    "cook": Command(
        weights.cook,
        "RECIPE PATH [PATH ...] -o OUT",
        "rebuild a soup from its recipe",
        "Rebuild a soup, bit for bit, from a recipe and the checkpoints that it was made of.",
        (options.recipe, options.checkpoints, options.output_in_shards, options.report),
    ),
    "verify": Command(
        weights.verify,
        "SOUP PATH [PATH ...]",
        "check that a soup is what its recipe gives",
        "Rebuild the tensors of a soup from its recipe and its checkpoints and compare them bit "
        "for bit. A SHA-256 that agrees shows that nothing was changed by accident; it is no "
        "signature.",
        (options.soup, options.checkpoints, options.report),
    ),
}
