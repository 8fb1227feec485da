"""The precision of forward passes: whether bfloat16 is useful, and the user's own autocast."""

from __future__ import annotations

import time

import torch

SIZE = 128  # of the matrices that are multiplied to find out: a few milliseconds in all
SLOWER = 3.0  # times, that are warned of


def judge_bfloat16(device: torch.device) -> str | None:
    """A warning if bfloat16 is slow on this processor, or None.

    The speed is measured, because it also depends on torch.
    """
    if device.type != "cpu":
        return None
    slower = seconds(torch.bfloat16) / seconds(torch.float32)
    if slower < SLOWER:
        return None
    return (
        f"precision='bf16' is slow on this processor: a matrix product takes {slower:.0f} times as "
        f"long in bfloat16 as in float32 (instructions that torch uses: "
        f"{torch.backends.cpu.get_cpu_capability()}). Use precision='fp32', or a GPU."
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What the user's own `torch.autocast` computes in on this device; None outside of one."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def seconds(dtype: torch.dtype) -> float:
    """Time of one product of matrices: the least of three, after one that prepares."""
    a = torch.ones(SIZE, SIZE, dtype=dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return min(times[1:])
