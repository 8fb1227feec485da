"""Evaluations side by side: on the ranks of a job, or in workers of joblib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from joblib import Parallel, delayed

from ..runtime.distributed import all_gather, rank, world_size
from .objective import Counts
from .scores import Evaluation, Evaluator

T = TypeVar("T", str, int)
Job: TypeAlias = Callable[[Evaluator], dict[T, Evaluation]]


def everywhere(
    job: Callable[[Sequence[T]], Job[T]],
    items: Sequence[T],
    evaluate: Evaluator,
    n_workers: int,
) -> dict[T, Evaluation]:
    """Evaluate all items: ``job(some)`` is what evaluates some of them, wherever it is sent.

    The ranks of a distributed job take every n-th item; else ``n_workers`` processes or threads
    take a part each, with a module of their own; with one worker everything runs here.
    """
    if world_size() > 1:
        mine = items[rank() :: world_size()]
        parts = all_gather(job(mine)(evaluate) if mine else {})
        return {item: found for part in parts for item, found in part.items()}
    if n_workers < 2:
        return job(items)(evaluate)
    found: dict[T, Evaluation] = {}
    tasks = (
        delayed(run_in_worker)(job(part.tolist()), evaluate, torch.get_num_threads())
        for part in np.array_split(np.array(items, dtype=object), n_workers)
    )
    for part, counts in Parallel(n_jobs=n_workers)(tasks):
        evaluate.objective.counts.add(counts)
        found |= part
    return found


def run_in_worker(
    job: Job[T], evaluate: Evaluator, threads: int
) -> tuple[dict[T, Evaluation], Counts]:
    """Run a job in a process or thread of its own, with the threads of the process that sent it."""
    torch.set_num_threads(threads)
    evaluate = evaluate.own()
    return job(evaluate), evaluate.objective.counts
