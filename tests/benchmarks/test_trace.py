"""A small fit stays a short walk through the package."""

from __future__ import annotations

from benchmarks.trace import small_fit


def test_a_small_fit_enters_few_functions_and_files_and_is_not_deep():
    calls = small_fit().calls
    files = {file for file, _ in calls}
    assert "recipes/mehl.py" in files  # it is the package that was traced
    assert len(calls) <= 130, sorted(calls)
    assert len(files) <= 15, sorted(files)
    assert max(depth for _, depth in calls.values()) <= 10
