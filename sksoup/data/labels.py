"""Labels in the order of the outputs, and those that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checkpoints.hub_config import output_labels
from .tokens import IGNORED


def is_dense(y: Any) -> bool:
    """Whether there are labels at several positions of a row: of pixels, of tokens."""
    return bool(y.ndim > 1 and y.shape[1:] != (1,))


def output_names(module: Any, n_outputs: int) -> tuple[str, ...] | None:
    """Names of the outputs in the config of a model of transformers, if it names all of them."""
    config = getattr(module, "config", None)
    names = output_labels(getattr(config, "id2label", None)) if config is not None else ()
    return names if len(names) == n_outputs else None


def ignore_index_of(criterion: Any) -> int | None:
    """The target that a criterion leaves out, also one given to a function by ``partial``."""
    criterion = criterion() if isinstance(criterion, type) else criterion
    own = criterion.keywords.get("ignore_index") if isinstance(criterion, partial) else None
    index = getattr(criterion, "ignore_index", own)
    return int(index) if isinstance(index, Integral) else None


def check_ignored(classes: NDArray[Any], ignored: int, dense: bool) -> None:
    """Refuse a criterion's ignore_index that is the label of one output and the index of another.

    Labels that are strings can't be taken for an index.
    """
    labels = classes.tolist()
    if (not dense and ignored == IGNORED) or all(isinstance(label, str) for label in labels):
        return
    if ignored == IGNORED and ignored in labels:
        raise ValueError(
            f"classes holds {IGNORED}, which marks positions to ignore. Use another label."
        )
    is_index = 0 <= ignored < len(labels)
    if (labels[ignored] != ignored) if is_index else (ignored in labels):
        which = (
            f"output {ignored} has the label {labels[ignored]!r}" if is_index else "it is a class"
        )
        raise ValueError(
            f"It is ambiguous which labels the criterion leaves out: its ignore_index is "
            f"{ignored}, but {which}. Use a criterion without it, and {IGNORED} in y at positions "
            f"to ignore, or remove the rows to ignore."
        )


def check_rows(y: NDArray[Any], n_outputs: int, ignored: int, classes: ArrayLike | None) -> None:
    """Refuse rows whose only label marks what is left out, unless it is a class."""
    if is_dense(y) or y.dtype.kind not in "iu" or classes is not None:
        return
    marks = [IGNORED] if 0 <= ignored < n_outputs else [IGNORED, ignored]
    for label in marks:
        if (y == label).any():
            raise ValueError(
                f"y holds {label}, which marks pixels and tokens to ignore, but here each row has "
                f"one label. Remove these rows, or pass classes=[...] if it is a label."
            )


def resolve_positions(y: NDArray[Any], n_outputs: int, named: bool) -> NDArray[np.int64]:
    """The labels of positions are indices of the outputs: a label for "void" is never a class.

    ``named`` says whether there is a criterion with an ignore_index.
    """
    others = np.unique(y[(y < 0) | (y >= n_outputs)])
    if not len(others):
        return np.arange(n_outputs)
    is_one = len(others) == 1
    are = f"{others[0]} is a label" if is_one else "they are labels"
    passed = " Or pass it to the criterion as ignore_index." if is_one and named else ""
    raise ValueError(
        f"y can't be matched to the module's outputs: it holds {some(others)}, expected integers "
        f"in [0, {n_outputs}), or {IGNORED} at positions to ignore.{void_remedy(y, others)}"
        f"{passed} If {are}, pass all labels in the order of the outputs: classes=[...]."
    )


def resolve_classes(
    y: NDArray[Any],
    n_outputs: int,
    classes: ArrayLike | None,
    names: Sequence[str] | None = None,
    dense: bool = False,
) -> NDArray[Any]:
    """Labels in output order; a missing label must not shift the columns."""
    present = np.unique(y)
    if classes is not None:
        known = np.asarray(classes)
        if known.ndim != 1 or len(np.unique(known)) != n_outputs or len(known) != n_outputs:
            raise ValueError(
                f"classes must be {n_outputs} distinct labels, one per output of the module, got "
                f"{some(known)}."
            )
        unknown = np.setdiff1d(present, known)
        if len(unknown):
            remedy = void_remedy(y, unknown) if dense else ""
            raise ValueError(f"y holds labels that are not in classes: {some(unknown)}.{remedy}")
        return known
    if names is not None and all(isinstance(label, str) for label in present.tolist()):
        named = np.array(names, dtype=object if present.dtype == object else None)
        unknown = np.setdiff1d(present, named)
        if len(unknown):
            raise ValueError(
                f"y holds labels that are not names of the module's outputs: {some(unknown)}. Its "
                f"config (id2label) has {some(named)}. Use these names in y, or pass the labels "
                f"in the order of the outputs: classes=[...]."
            )
        return named
    numbers = numbers_in(names)
    if present.dtype.kind in "iu" and len(numbers) and np.isin(present, numbers).all():
        return numbers
    if names is not None:
        _refuse_some_numbers(present, names)
    if len(present) == n_outputs:
        return present
    if np.issubdtype(present.dtype, np.integer) and present[0] >= 0 and present[-1] < n_outputs:
        return np.arange(n_outputs)
    raise ValueError(
        f"y can't be matched to the module's outputs: got {len(present)} distinct labels "
        f"({some(present)}) for {n_outputs} outputs, expected {n_outputs} labels or integers in "
        f"[0, {n_outputs}). Pass the labels in the order of the outputs: classes=[...]."
    )


def _refuse_some_numbers(present: NDArray[Any], names: Sequence[str]) -> None:
    """Refuse integers that are names, but not indices, of outputs whose other names are texts."""
    if present.dtype.kind not in "iu" or not {str(label) for label in present.tolist()} <= {*names}:
        return
    if any(not 0 <= k < len(names) or names[k] != str(k) for k in present.tolist()):
        raise ValueError(
            f"y holds {some(present)}, which are names of the module's outputs, but could also be "
            f"their indices. Its config (id2label) has {some(np.array(names))}. Use these names "
            f"in y, as texts, or pass the labels in the order of the outputs: classes=[...]."
        )


def numbers_in(names: Sequence[str] | None) -> NDArray[np.int64]:
    """The numbers that a config has as names of the outputs, such as 1 to 5 stars; or none."""
    try:
        numbers = np.array([int(name) for name in names or ()], dtype=np.int64)
    except (ValueError, OverflowError):
        return np.arange(0)
    return numbers if len(np.unique(numbers)) == len(numbers) else np.arange(0)


def void_remedy(y: NDArray[Any], labels: NDArray[Any]) -> str:
    """What to do with labels of positions that are no classes, as they may stand for none."""
    is_one = len(labels) == 1
    where = f"y == {labels[0]}" if is_one else f"np.isin(y, {labels.tolist()})"
    if np.can_cast(np.int8, y.dtype):
        code = f": y[{where}] = {IGNORED}"
    else:  # unsigned integers, as images have
        code = f": y = np.where({where}, {IGNORED}, y.astype(int))"
    marks, it = (f"{labels[0]} marks", "it") if is_one else ("they mark", "them")
    return (
        f" If {marks} positions without a label, replace {it} by {IGNORED}"
        f"{code if len(labels) <= 5 else ''}."
    )


def some(values: NDArray[Any]) -> str:
    """Up to five values as text, and the number of the others."""
    shown = ", ".join(repr(value) for value in values[:5].tolist())
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")
