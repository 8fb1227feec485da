"""A small fit stays a short walk through the package."""

from __future__ import annotations

import pytest

from benchmarks.trace import PAPER, small_fit


@pytest.mark.parametrize(
    ("settings", "n_functions", "n_files", "depth"),
    [(PAPER, 221, 31, 14), ({}, 257, 34, 18)],  # the default also ranks, measures and compares
)
def test_a_small_fit_enters_few_functions_and_files_and_is_not_deep(
    settings, n_functions, n_files, depth
):
    calls = small_fit(**settings).calls
    files = {file for file, _ in calls}
    assert "recipes/mehl.py" in files  # it is the package that was traced
    assert len(calls) <= n_functions, sorted(calls)
    assert len(files) <= n_files, sorted(files)
    assert max(deep for _, deep in calls.values()) <= depth
