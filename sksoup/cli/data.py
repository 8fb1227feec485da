"""Validation and test data as a soup takes them, from files and the options of a command."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.hub_config import output_labels
from ..exceptions import SoupWarning
from .files import DataFile, listed, read_file
from .tokenizer import find_tokenizer, first_config, load_tokenizer, set_padding, tokenize

INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
# the column of row numbers that pandas writes by default, and what it calls it when it reads it
UNNAMED = re.compile(r"|Unnamed: \d+(\.\d+)?")
MULTIPLE = ("regression", "multilabel")  # tasks with several targets per example


@dataclass(frozen=True)
class Data:
    """Inputs and labels of the examples in a file."""

    X: Any
    y: Any  # None for language models
    n: int


def load_data(
    options: argparse.Namespace, collection: CheckpointCollection
) -> tuple[Data, Data | None, Any, list[Any] | None]:
    """The validation data, the test data, the tokenizer's folder, labels in output order."""
    _check_options(options)
    files = [read_file(Path(options.data), options.delimiter)]
    if options.test is not None:
        _warn_of_one_file(options)
        files.append(read_file(Path(options.test), options.delimiter))
    classes = None
    if options.task != "classification":
        targets = [_targets(file, options) for file in files]
    else:
        config, source = first_config(collection)
        names = list(output_labels(config.get("id2label")))
        targets = _labels(files, options, names)
        classes = _check_classes(options, files, targets, names, repr(str(source)))
    folder = None
    if options.text is not None:
        texts = [[file.texts(name) for name in options.text] for file in files]
        folder = find_tokenizer(collection, options.tokenizer)
        tokenizer = load_tokenizer(folder)
        config, _ = first_config(collection)
        set_padding(tokenizer, config, collection.module)
        inputs = [tokenize(tokenizer, part, options.max_length, config) for part in texts]
    else:
        # the columns of the validation data, by name, also where the test data have another order
        first = next((file for file in files if file.is_table), files[0])
        columns = _columns(first, options)
        inputs = [_inputs(file, columns if file.is_table else options.inputs) for file in files]
    found = [
        Data(X, y, _n_examples(file, X, y))
        for file, X, y in zip(files, inputs, targets, strict=True)
    ]
    return found[0], found[1] if len(found) > 1 else None, folder, classes


def _n_examples(file: DataFile, X: Any, y: Any) -> int:
    """The number of rows of the inputs and labels, which are some of the arrays in a file."""
    parts = [*(X.values() if isinstance(X, dict) else [X]), *([] if y is None else [y])]
    if len({len(part) for part in parts}) > 1:
        shapes = ", ".join(str(part.shape) for part in parts)
        raise ValueError(
            f"{str(file.path)!r}: the arrays of the inputs and labels have the shapes {shapes}, "
            f"expected as many rows, one per example, in each of them."
        )
    return len(parts[0])


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    is_text_task = options.task == "language-modeling"
    if is_text_task and (options.text is None or len(options.text) > 1 or options.label):
        raise ValueError(
            "--task language-modeling needs one --text COLUMN and no --label: the labels are the "
            "next tokens of the texts."
        )
    if len(options.text or ()) > 2:
        raise ValueError(
            f"--text was given {len(options.text)} times, expected once, or twice for pairs of "
            f"texts."
        )
    if options.text is not None and options.inputs:
        raise ValueError("--text and --inputs can't be given together: the texts are the inputs.")
    if len(options.label or ()) > 1 and options.task not in MULTIPLE:
        raise ValueError(
            f"--label was given {len(options.label)} times, expected once for --task "
            f"{options.task}. Several are for --task {' and '.join(MULTIPLE)}."
        )
    if options.classes and options.task != "classification":
        raise ValueError(f"--classes is for --task classification, got --task {options.task}.")


def _warn_of_one_file(options: argparse.Namespace) -> None:
    """Warn if the validation data are also the test data."""
    data, test = Path(options.data), Path(options.test)
    if data.exists() and test.exists() and data.samefile(test):
        warnings.warn(
            f"--test {options.test!r} is the file of --data, on which the soup is chosen, so its "
            f"score is optimistic. Give examples that are not in --data.",
            SoupWarning,
            stacklevel=2,
        )


def _label_names(file: DataFile, options: argparse.Namespace) -> list[str]:
    if options.label:
        return list(options.label)
    if file.is_table:
        raise ValueError(
            f"Give --label COLUMN: which column of {str(file.path)!r} holds the labels? It has "
            f"{listed(file.parts)}."
        )
    return ["y"]


def _labels(
    files: Sequence[DataFile], options: argparse.Namespace, outputs: Sequence[str]
) -> list[NDArray[Any]]:
    """Labels of the validation and test data; ``outputs`` are their names, if there are some."""
    columns = [_label_names(file, options)[0] for file in files]
    found = [file.labels(name, outputs) for file, name in zip(files, columns, strict=True)]
    found = [y[:, 0] if y.shape[1:] == (1,) else y for y in found]
    if found[0].dtype.kind == "U" and files[-1].is_table:  # the test data may have only numbers
        found[-1] = np.array(files[-1].texts(columns[-1]))
    return found


def _targets(file: DataFile, options: argparse.Namespace) -> Any:
    """Targets in a file; None for language models."""
    if options.task == "language-modeling":
        return None
    columns = [file.numbers(name) for name in _label_names(file, options)]
    return columns[0] if len(columns) == 1 else np.stack(columns, axis=1)


def _columns(file: DataFile, options: argparse.Namespace) -> list[str]:
    """The columns of the inputs in a table: those given, or all but the labels."""
    labels = _label_names(file, options) if file.is_table else []
    others = [name for name in file.parts if name not in labels]
    names = options.inputs or [name for name in others if not UNNAMED.fullmatch(name)]
    if not options.inputs and len(names) < len(others):
        warnings.warn(
            f"{str(file.path)!r} has a column without a name, in which pandas writes the numbers "
            f"of the rows (to_csv without index=False). It is not used as an input; to use it, "
            f"give it a name.",
            SoupWarning,
            stacklevel=2,
        )
    if not names:
        raise ValueError(f"{str(file.path)!r} has no columns besides {listed(labels)}.")
    return list(names)


def _inputs(file: DataFile, names: Sequence[str] | None) -> Any:
    """Inputs: a matrix of the numeric columns of a table; an array, or several by name."""
    if file.is_table and names:
        return np.stack([file.numbers(name) for name in names], axis=1).astype(np.float32)
    names = names or ["X"]
    arrays = {name: file.numbers(name) for name in names}
    return arrays if len(arrays) > 1 else arrays[names[0]]


def _check_classes(
    options: argparse.Namespace,
    files: Sequence[DataFile],
    targets: Sequence[NDArray[Any]],
    names: list[Any],
    source: str,
) -> list[Any] | None:
    """Refuse labels that are no outputs, and validation data with one label; --classes, parsed.

    ``names`` are those of the outputs in the config.json ``source``, if it has some.
    """
    y = targets[0]
    if y.ndim > 1:  # of pixels and tokens
        return _parsed_classes(options.classes, y)
    label = _label_names(files[0], options)[0]
    distinct = list(dict.fromkeys(y.tolist()))
    if len(distinct) < 2:
        raise ValueError(
            f"{str(files[0].path)!r}: all {len(y)} labels in {label!r} are {distinct[0]!r}, "
            f"expected two or more different ones."
        )
    _check_kinds(files, targets, label)
    classes = _parsed_classes(options.classes, y)
    known, source = (classes, "--classes") if classes else (names, source)
    are_texts = all(isinstance(one, str) for one in distinct)
    if not classes and not are_texts:
        return None
    if not known:
        known, source = distinct, f"the validation data {str(files[0].path)!r}"
    wanted = set(known)
    for file, values in zip(files, targets, strict=True):
        for index, value in enumerate(values.tolist()):
            if value not in wanted:
                raise ValueError(
                    f"{file.where(index, label)}: got the label {value!r}, expected one of "
                    f"{listed(known)}, as in {source}. Correct it, or give the labels in the "
                    f"order of the model's outputs: --classes A B ..."
                )
    return classes


def _check_kinds(files: Sequence[DataFile], targets: Sequence[NDArray[Any]], label: str) -> None:
    """Refuse test labels that are texts where those of the validation data are integers."""
    if len(files) == 1 or targets[0].dtype.kind not in "iu" or targets[1].dtype.kind != "U":
        return
    texts = targets[1].tolist()
    odd = next((k for k, text in enumerate(texts) if not INTEGER.fullmatch(text.strip())), 0)
    raise ValueError(
        f"{files[1].where(odd, label)}: got the label {texts[odd]!r}, expected an integer, as in "
        f"the validation data {str(files[0].path)!r}. Correct it, and write each integer in one "
        f"way: 1, not 01."
    )


def _parsed_classes(given: Sequence[str] | None, y: NDArray[Any]) -> list[Any] | None:
    if not given:
        return None
    if y.dtype.kind not in "iu":
        return list(given)
    try:
        return [int(one) for one in given]
    except ValueError as error:
        raise ValueError(
            f"--classes has {listed(given)}, expected integers, as the labels in the data are."
        ) from error
