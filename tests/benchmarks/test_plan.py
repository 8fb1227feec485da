"""The closed forms of `benchmarks.plan`, and its simulation of readers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plan


def test_one_device_holds_what_eight_share():
    size = plan.SIZES[2]
    alone, eighth = (plan.held_bytes(size, n) for n in (1, 8))
    assert alone == pytest.approx(8 * (eighth - 2 * plan.WIDE * size.block))
    assert plan.held_bytes(size, 1, on_gpu=False) - alone == plan.WIDE * size.n_parameters
    assert plan.read_bytes(size, 1) == 8 * plan.read_bytes(size, 8)
    assert plan.sent_bytes(size, 1) == (0, 0)


def test_the_page_shows_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan"])
    plan.main()
    page = (Path(__file__).parents[2] / "docs" / "plan.rst").read_text(encoding="utf-8")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 13
    for line in printed:
        assert f"    {line}\n" in page
    sizes = {size.name: size for size in plan.SIZES}
    assert plan.held_bytes(sizes["7B"], 8) < 24e9 < plan.held_bytes(sizes["7B"], 1)
    assert plan.held_bytes(sizes["70B"], 8) < 141e9 < plan.held_bytes(sizes["70B"], 1)
    assert plan.held_bytes(sizes["70B"], 64) < 24e9


def by_hand(n: int, n_reads: int, seconds: float, work: float, ahead: int) -> float:
    """The same minute by minute: a disk that reads, and ranks that work in step."""
    tick = 0.25
    done, taken, idle, busy, rest = [0] * n, 0, 0.0, None, 0.0
    working = 0.0
    while True:
        if working > 0:
            working -= tick
        if working <= 0:
            if taken == n_reads:
                return idle
            if min(done) > taken:
                taken += 1
                working = work
            else:
                idle += tick
        if busy is None:
            may = taken + ahead if ahead else taken + (working <= 0)
            free = [r for r in range(n) if done[r] < min(n_reads, may)]
            if free:
                busy, rest = min(free, key=lambda r: (done[r], r)), seconds
        if busy is not None:
            rest -= tick
            if rest <= 0:
                done[busy] += 1
                busy = None


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("work", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_waiting_for_the_disk_is_that_of_a_clock(n, work, ahead):
    found = plan.waited(n, 10, 1.0, work, ahead)
    assert found == pytest.approx(by_hand(n, 10, 1.0, work, ahead), abs=0.3 * 10 + 1)


def test_a_reader_ahead_hides_reads_that_are_shorter_than_the_steps():
    assert plan.waited(1, 10, 1.0, 5.0, ahead=0) == pytest.approx(10)
    assert plan.waited(1, 10, 1.0, 5.0, ahead=1) == pytest.approx(1)
    # of a shared disk, 8 ranks read 8 parts
    assert plan.waited(8, 10, 1.0, 5.0, ahead=1) > plan.waited(8, 10, 1.0, 9.0, ahead=1)
