"""The test sets of a comparison: one, or several by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.arrays import n_rows
from ..data.rows import is_loader

Rows = tuple[Any, Any]


def named_test_sets(X: Any, y: Any, X_test: Any, y_test: Any) -> dict[str, Rows]:
    """The test sets by name: none, "test", or those of a mapping.

    A mapping with the keys of X, the validation inputs, is one set of several inputs. Sets are
    inputs that share ``y_test``, or pairs of inputs and labels.
    """
    is_one_set = (
        isinstance(X, Mapping) and isinstance(X_test, Mapping) and X.keys() == X_test.keys()
    )
    if not isinstance(X_test, Mapping) or is_one_set:
        if y is not None and (X_test is None) != (y_test is None):
            raise ValueError("Give both X_test and y_test, or neither.")
        return {} if X_test is None else {"test": (X_test, y_test)}
    if not X_test:
        raise ValueError("X_test is an empty mapping, expected test sets by name.")
    sets = {}
    for name, given in X_test.items():
        if not isinstance(name, str):
            raise TypeError(f"X_test has a key {name!r}, expected the name of a test set, a str.")
        sets[name] = _rows(name, given, y, y_test)
    return sets


def _rows(name: str, given: Any, y: Any, y_test: Any) -> Rows:
    if y_test is not None or (y is None and not _is_pair(given)):
        found = given, y_test
    elif _is_pair(given):
        found = given
    else:
        raise ValueError(
            f"X_test[{name!r}] is a {type(given).__name__}, expected a pair (X, y) as y_test is "
            f"None. Give pairs, or y_test if all test sets have the same labels."
        )
    inputs, labels = found
    if labels is not None and not is_loader(inputs) and len(labels) != n_rows(inputs):
        raise ValueError(
            f"X_test[{name!r}] has {n_rows(inputs):,} rows, but {len(labels):,} labels: every row "
            f"needs one."
        )
    return found


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2
