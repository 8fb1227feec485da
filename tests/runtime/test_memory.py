from __future__ import annotations

import pytest
import torch

from sksoup.runtime import memory
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


VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("", "memory.max", "memory.current", "inactive_file")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine with 64 GB free, and a function that makes control groups on it."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 62500000 kB\n")

    def make(version, member_of, **groups):
        folder, limit_file, usage_file, pages_of = version
        line = "4:memory:" if folder else "0::"
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:cpu:/\n{line}{member_of}\n")
        for path, (limit, usage, pages) in groups.items():
            group = tmp_path / "cgroup" / folder / path.replace("_", "/").strip("/")
            group.mkdir(parents=True, exist_ok=True)
            (group / limit_file).write_text(f"{limit}\n")
            (group / usage_file).write_text(f"{usage}\n")
            (group / "memory.stat").write_text(f"anon 1\n{pages_of} {pages}\n")
        return free_bytes(torch.device("cpu"))

    return make


@pytest.mark.parametrize("version", [VERSION_1, VERSION_2])
def test_free_memory_is_what_the_container_leaves(groups, version):
    assert groups(version, "/") == 64 * 10**9  # no limit file
    assert groups(version, "/job", job=(16 * 10**9, 10**9, 5)) == 15 * 10**9 + 5
    # as a container sees it: its own group is at the top
    assert groups(version, "/docker/12", _=(8 * 10**9, 10**9, 0)) == 7 * 10**9
    # the tightest of a job and its steps
    both = {"job": (6 * 10**9, 5 * 10**9, 0), "job_step": (4 * 10**9, 10**9, 0)}
    assert groups(version, "/job/step", **both) == 10**9
    assert groups(version, "/job/step", job=(10**9, 2 * 10**9, 0)) == 0  # above its limit


def test_a_control_group_without_a_limit(groups):
    assert groups(VERSION_2, "/job", job=("max", 10**9, 0)) == 64 * 10**9
    assert groups(VERSION_1, "/job", job=(2**63 - 4096, 10**9, 0)) == 64 * 10**9


def test_what_says_that_memory_ran_out():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory"))
