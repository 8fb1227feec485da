"""The processes of a torch.distributed job; one process is a job of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from ..exceptions import RankError


def world_size() -> int:
    """How many processes work together."""
    is_job = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_world_size()) if is_job else 1


def rank() -> int:
    """Which of them this is; 0 writes."""
    is_job = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_rank()) if is_job else 0


def share(n: int) -> slice:
    """Give this rank's part of n rows: as many as the others', or one more."""
    here = rank()
    size, more = divmod(n, world_size())
    start = here * size + min(here, more)
    return slice(start, start + size + (here < more))


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors, the same bits on each; this one is overwritten."""
    if world_size() == 1:
        return tensor
    with _naming():
        if _device() == tensor.device.type:
            distributed.all_reduce(tensor)
            return tensor
        moved = tensor.to(_device())
        distributed.all_reduce(moved)
        return tensor.copy_(moved)


def smallest(value: int) -> int:
    """The smallest of the ranks' numbers."""
    return value if world_size() == 1 else int(min(all_gather(value)))


def broadcast(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    with _naming():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in order of rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _naming():
        distributed.all_gather_object(values, value)
    return values


def _device() -> str:
    """Where the backend's tensors live."""
    return "cuda" if "nccl" in str(distributed.get_backend()) else "cpu"


@contextmanager
def _naming() -> Iterator[None]:
    """Explain a collective that failed: the other ranks have stopped, or do not answer."""
    try:
        yield
    except RuntimeError as error:  # what torch raises for a lost peer and for a timeout
        raise RankError(
            f"Rank {rank()} of {world_size()} lost the others: one of them stopped, or did not "
            f"answer within the timeout of the process group ({str(error).splitlines()[0]}). Its "
            f"own output says why. Start the job again; with memory= it goes on where it was."
        ) from error
