from __future__ import annotations

import pytest
import torch

from sksoup.runtime.memory import Budget, free_bytes, is_out_of_memory, parse_bytes


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, 1), ("8GB", 8 * 10**9), ("1.5 mb", 1_500_000), (2**40, 2**40)]
)
def test_memory_limits(limit, expected):
    assert parse_bytes(limit) == expected


@pytest.mark.parametrize("limit", ["8", "many GB", "GB"])
def test_memory_limits_that_are_none(limit):
    with pytest.raises(ValueError, match=r"is not a size"):
        parse_bytes(limit)
    with pytest.raises(ValueError, match="must be positive"):
        parse_bytes(0)


def test_auto_takes_what_the_limit_holds():
    cpu = torch.device("cpu")

    def budget(limit, n_fixed=2, delta_bytes=100):
        return Budget(limit, 100, delta_bytes, n_fixed, cpu)

    assert budget(2000).resolve("auto", 72) == 18  # 20 models, 2 of them fixed
    assert budget(2000, n_fixed=3).resolve("auto", 72) == 17
    assert budget(2000, delta_bytes=50).resolve("auto", 72) == 36
    assert budget(None).resolve("auto", 5) == 5
    assert budget(None).resolve(None, 5) == 5
    assert budget(None).resolve(9, 5) == 5
    assert budget(2000).resolve(18, 72) == 18


def test_a_limit_that_does_not_hold_what_is_asked_for():
    budget = Budget(2000, 100, 100, 2, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"is too small for a model batch of 19, which needs 2,100"
    ):
        budget.resolve(19, 72)
    with pytest.raises(ValueError, match="model_batch_size=18 fits"):
        budget.resolve(None, 72)
    with pytest.raises(ValueError, match="is too small for a model batch of 1"):
        Budget(250, 100, 100, 2, torch.device("cpu")).resolve("auto", 72)


def test_free_memory_is_a_number_of_bytes():
    assert 10**7 < free_bytes(torch.device("cpu")) < 10**15


def test_what_says_that_memory_ran_out():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory"))
