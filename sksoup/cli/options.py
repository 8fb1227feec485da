"""The options of the commands, in groups."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..mixing.mix import DTYPES
from .search import RECIPES, systems

Parser = argparse.ArgumentParser

PATHS = (
    "a checkpoint (a file or a Hugging Face folder), a folder of them, a quoted pattern such as "
    "'runs/*.pt', or a sweep: a folder of training runs, each with checkpoints in it, of which the "
    "best of each run is taken"
)
TASKS = ("classification", "regression", "multilabel", "language-modeling")


def checkpoints(parser: Parser) -> Any:
    """What to mix."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("sources", metavar="PATH", nargs="+", help=PATHS)
    group.add_argument(
        "--which", choices=("best", "last", "all"),
        help="which checkpoint of each run (default: the best of each run of a sweep; all of a "
        "path that is one run)",
    )  # fmt: skip
    group.add_argument(
        "--key", metavar="NAME",
        help="which state dict of files that hold several, such as ema",
    )  # fmt: skip
    group.add_argument(
        "--prefix", metavar="TEXT",
        help="take only the tensors whose names begin with this, and remove it from the names",
    )  # fmt: skip
    group.add_argument(
        "--base", metavar="FOLDER",
        help="Hugging Face folder of the model that LoRA adapters were trained on (default: the "
        "one that they name)",
    )  # fmt: skip
    return group


def chosen_checkpoints(parser: Parser) -> None:
    """What to mix, and what to leave out."""
    checkpoints(parser).add_argument(
        "--healthy", action="store_true",
        help="leave out checkpoints that diverged, hold NaN or can't be read, with a warning that "
        "names them",
    )  # fmt: skip


def report(parser: Parser) -> None:
    """How results are printed."""
    group = parser.add_argument_group("report")
    group.add_argument("--json", action="store_true", help="print JSON, errors included")


class _Once(argparse.Action):
    """Store a value; the option may not be repeated, since only the last one would count."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice, expected one file")
        setattr(namespace, self.dest, values)


def data(parser: Parser, needs_test: bool = False) -> None:
    """Validation data and test data."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="FILE", required=True, action=_Once,
        help="validation data: labeled examples not used for training, in a .csv or .tsv file "
        "with a header (UTF-8) or an .npz file of arrays",
    )  # fmt: skip
    group.add_argument(
        "--test", metavar="FILE", required=needs_test, action=_Once,
        help="test data in the same form, on which the soup and the best checkpoint are scored",
    )  # fmt: skip
    group.add_argument(
        "--label", metavar="NAME", action="append",
        help="column or array of the labels (default for .npz: y); repeat it for several targets "
        "of a regression or several labels",
    )  # fmt: skip
    group.add_argument(
        "--text", metavar="NAME", action="append",
        help="column of the texts, for Hugging Face models of text; repeat it for the second text "
        "of pairs",
    )  # fmt: skip
    group.add_argument(
        "--inputs", metavar="NAME", action="append",
        help="column or array of the inputs; repeat it for several (default: all columns but the "
        "labels, which must be numbers; X of an .npz file). Several arrays are passed to the "
        "network by name",
    )  # fmt: skip
    group.add_argument(
        "--classes", nargs="+", metavar="LABEL",
        help="labels in the order of the network's outputs (default: id2label of the model's "
        "config.json for texts, otherwise sorted)",
    )  # fmt: skip
    group.add_argument("--delimiter", metavar="CHAR", help="of a table (default: , or tab in .tsv)")
    group.add_argument(
        "--task", choices=TASKS, default="classification",
        help="what the network predicts (default: classification); language-modeling needs --text "
        "and no --label",
    )  # fmt: skip


def data_and_test(parser: Parser) -> None:
    """Validation data and test data, both needed."""
    data(parser, needs_test=True)


def network(parser: Parser) -> None:
    """What the checkpoints are loaded into, and how it runs."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--module", metavar="MODULE:FACTORY",
        help="class or function without arguments that returns the network, such as model:build "
        "for build in model.py of the current folder; this runs your code. Hugging Face folders "
        "need none",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", metavar="FOLDER",
        help="for --text: folder of the tokenizer (default: the first checkpoint's)",
    )  # fmt: skip
    group.add_argument(
        "--max-length", type=_at_least_one, metavar="N",
        help="for --text: tokens after which a text is cut (default: what the model allows, at "
        "most 512)",
    )  # fmt: skip
    group.add_argument(
        "--device", metavar="NAME", help="such as cpu or cuda:0 (default: a GPU if there is one)"
    )
    group.add_argument(
        "--batch-size", type=_at_least_one, metavar="N", help="examples per pass (default: 128)"
    )
    group.add_argument(
        "--seed", "--random-state", type=int, metavar="N", dest="random_state",
        help="seed of everything that is drawn at random",
    )  # fmt: skip


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value


def _models(text: str) -> int | str:
    return text if text in ("auto", "all") else _at_least_one(text)


def _default(command: str, name: str) -> Any:
    """Default of a parameter of the soup that a command fits."""
    return getattr(RECIPES[command], name)


def average(parser: Parser) -> None:
    """Weights of the checkpoints."""
    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--weights", type=float, nargs="+", metavar="W",
        help="one number per checkpoint, in the order in which `sksoup inspect` lists them, with "
        "the sum 1 (default: equal weights)",
    )  # fmt: skip


def stock(parser: Parser) -> None:
    """The pretrained start."""
    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--start", metavar="PATH", required=True, type=Path,  # never the name of a checkpoint
        help="the pretrained checkpoint that all were fine-tuned from: a file or a folder",
    )  # fmt: skip


def recipe(parser: Parser) -> None:
    """Where a recipe is."""
    parser.add_argument_group("recipe").add_argument(
        "recipe", metavar="RECIPE",
        help="a recipe (.json), or a soup, file or folder, that contains one",
    )  # fmt: skip


def soup(parser: Parser) -> None:
    """Where a soup is."""
    parser.add_argument_group("recipe").add_argument(
        "recipe", metavar="SOUP", help="the soup: a file or a folder that contains its recipe"
    )


def greedy(parser: Parser) -> None:
    """How Greedy-Soup searches."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--scoring", metavar="NAME",
        help="metric of scikit-learn to maximize, such as f1_macro (default: accuracy, or R² of a "
        "regression)",
    )  # fmt: skip
    group.add_argument(
        "--min-improvement", type=float, metavar="D",
        help="how much a checkpoint must raise the score to be added (default: 0, ties are added)",
    )  # fmt: skip
    _memory(group)


def learned(parser: Parser) -> None:
    """How Learned-Soup searches."""
    _descent(parser, "learned")


def mehl(parser: Parser) -> None:
    """How MEHL-Soup searches."""
    _descent(parser, "mehl").add_argument(
        "--model-batch-size", type=_models, metavar="N",
        help="checkpoints in memory at a time: a number, all, or auto (default: auto, as many as "
        "fit)",
    )  # fmt: skip


def _descent(parser: Parser, command: str) -> Any:
    group = parser.add_argument_group("search")
    group.add_argument(
        "--layerwise", action="store_true",
        help="a coefficient per checkpoint and layer, not one per checkpoint",
    )  # fmt: skip
    group.add_argument(
        "--epochs", type=_at_least_one, metavar="N", dest="max_epochs",
        help=f"passes over the validation data (default: {_default(command, 'max_epochs')})",
    )  # fmt: skip
    group.add_argument(
        "--lr", type=float, metavar="X", help=f"learning rate (default: {_default(command, 'lr')})"
    )
    group.add_argument(
        "--memory-limit", metavar="SIZE",
        help="memory for the checkpoints, such as 8GB (default: half of what is free)",
    )  # fmt: skip
    _memory(group)
    return group


def _memory(group: Any) -> None:
    group.add_argument(
        "--memory", metavar="FOLDER",
        help="where intermediate results are kept, so that an interrupted run resumes",
    )  # fmt: skip


def compare(parser: Parser) -> None:
    """What is compared, and how."""
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--system", action="append", choices=list(systems(1)), metavar="NAME",
        help="compare only this method with the best checkpoint; repeat it for several (default: "
        "all): " + ", ".join(systems(1)),
    )  # fmt: skip
    group.add_argument(
        "--scoring", metavar="NAME",
        help="metric of scikit-learn in the table, such as f1_macro (default: accuracy, or R² of a "
        "regression)",
    )  # fmt: skip
    group.add_argument(
        "--repeats", type=_at_least_one, default=1, metavar="N",
        help="fits with different seeds of the methods that draw at random (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--measure-memory", action="store_true",
        help="fit every method a second time to measure its memory",
    )  # fmt: skip


def output(parser: Parser) -> Any:
    """Where the result is written."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="a .safetensors file; or a new folder: a Hugging Face folder with configuration and "
        "tokenizer if the checkpoints are Hugging Face folders, otherwise weights only",
    )  # fmt: skip
    group.add_argument("--force", action="store_true", help="replace an existing file")
    return group


def output_in_shards(parser: Parser) -> Any:
    """Where it is written, and how large its files are."""
    group = output(parser)
    group.add_argument(
        "--shard-size", metavar="SIZE",
        help="largest size of a file in a folder, such as 500MB (default: 5GB)",
    )  # fmt: skip
    return group


def output_of_dtype(parser: Parser) -> None:
    """Where it is written, in files of which size and dtype."""
    output_in_shards(parser).add_argument(
        "--dtype", choices=[name for name in DTYPES if name != "float64"],
        help="dtype of the floating tensors that are written (default: that of the checkpoints)",
    )  # fmt: skip
