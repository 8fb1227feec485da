"""The processes of a torch.distributed job; one process is a job of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from ..exceptions import RankError


def n_ranks() -> int:
    """How many processes work together."""
    is_job = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_world_size()) if is_job else 1


def rank() -> int:
    """Which of them this is; 0 writes."""
    return int(distributed.get_rank()) if n_ranks() > 1 else 0


def share(n: int) -> slice:
    """Give this rank's part of n rows: as many as the others', or one more."""
    size, more = divmod(n, n_ranks())
    start = rank() * size + min(rank(), more)
    return slice(start, start + size + (rank() < more))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors, the same bits on each; this one is overwritten."""
    if n_ranks() == 1:
        return tensor
    with _naming():
        if _device() == tensor.device.type:
            distributed.all_reduce(tensor)
            return tensor
        moved = tensor.to(_device())
        distributed.all_reduce(moved)
        return tensor.copy_(moved)


def least_over_ranks(value: int) -> int:
    """The smallest of the ranks' numbers."""
    return int(min(gather(value)))


def from_first(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    if n_ranks() == 1:
        return value
    values = [value]
    with _naming():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """What each rank has, in order of rank."""
    if n_ranks() == 1:
        return [value]
    values: list[Any] = [None] * n_ranks()
    with _naming():
        distributed.all_gather_object(values, value)
    return values


def _device() -> str:
    """Where the backend's tensors live."""
    return "cuda" if "nccl" in str(distributed.get_backend()) else "cpu"


@contextmanager
def _naming() -> Iterator[None]:
    """Say what it means when a collective fails: the others are gone, or hang."""
    try:
        yield
    except RuntimeError as error:  # what torch raises for a lost peer and for a timeout
        raise RankError(
            f"Rank {rank()} of {n_ranks()} lost the others: one of them stopped, or did not answer "
            f"within the timeout of the process group ({str(error).splitlines()[0]}). Its own "
            f"output says why. Start the job again; with memory= it goes on where it was."
        ) from error
