"""The processes of a torch.distributed job; one process is a job of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from ..exceptions import RankError
from ..tables import short

# what the backends say of a peer that is gone, or does not answer
LOST = re.compile(r"\bgloo\b|\bNCCL\b|Connection (closed|reset)|[Tt]imed out waiting")


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


def share_or_last(n: int) -> slice:
    """`share`, or the last row where there are fewer than ranks: a pass needs one."""
    mine = share(n)
    return mine if mine.start < mine.stop else slice(n - 1, n)


def gather_rows(mine: torch.Tensor, n: int) -> torch.Tensor:
    """The rows of all ranks, in order, of which each has given its `share_or_last` of n."""
    most = -(-n // world_size())
    sent = mine.new_zeros((most, *mine.shape[1:]))
    sent[: len(mine)] = mine
    sent = sent.to(_device())
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    with _naming():
        distributed.all_gather(parts, sent)
    size, more = divmod(n, world_size())
    return torch.cat([part[: size + (i < more)] for i, part in enumerate(parts)]).to(mine.device)


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


@contextmanager
def agreed(is_shared: bool) -> Iterator[None]:
    """Raise an error on every rank if one of them has an error, since the others would wait.

    Only for what all ranks do in the same order, ``is_shared``.
    """
    if not is_shared:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    said = all_gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for other, text in enumerate(said):
        if text is not None:
            raise RankError(f"Rank {other} of {world_size()} stopped with {text}")


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


def refuse_differing(values: Mapping[str, Any]) -> None:
    """Raise an error on every rank if something that all need is not the same on all."""
    first, *others = all_gather(dict(values))
    for other, found in enumerate(others, 1):
        for what, value in found.items():
            if value != first[what]:
                raise RankError(
                    f"Ranks 0 and {other} of {world_size()} have different {what}: "
                    f"{short(first[what])} and {short(value)}. Open the same checkpoints and the "
                    f"same validation data on every rank."
                )


def _device() -> str:
    """Where the backend's tensors live."""
    return "cuda" if "nccl" in str(distributed.get_backend()) else "cpu"


@contextmanager
def _naming() -> Iterator[None]:
    """Explain a collective that failed: the other ranks have stopped, or do not answer."""
    try:
        yield
    except RuntimeError as error:  # what torch raises for a lost peer and for a timeout
        raise lost(error) from error


def lost(error: Exception) -> RankError:
    """The error for a rank that is gone."""
    return RankError(
        f"Rank {rank()} of {world_size()} lost the others: one of them stopped, or did not answer "
        f"within the timeout of the process group ({str(error).splitlines()[0]}). See its own "
        f"output for the reason. Start the job again; with memory= it resumes where it stopped."
    )


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """The same for passes of a sharded module, whose errors may also be the module's own."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        if world_size() > 1 and LOST.search(str(error)):
            raise lost(error) from error
        raise
