"""Parallel evaluation on the ranks of a distributed job or in joblib workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from joblib import Parallel, delayed

from ..runtime.distributed import all_gather, rank, world_size
from .objective import Counts
from .scores import Evaluation, Evaluator

T = TypeVar("T", str, int, contravariant=True)


class Trial(Protocol[T]):
    """Loads the weights that an item stands for and scores them; it is sent to workers."""

    def __call__(self, item: T, evaluate: Evaluator, /) -> Evaluation:
        """Score an item."""

    def key(self, item: T, /) -> tuple[Any, ...]:
        """What an item's score depends on, beside the rows."""

    def only(self, items: Sequence[T], /) -> Self:
        """The same with no more than these items need: less to send."""


def evaluate_all(
    trial: Trial[T], items: Sequence[T], evaluate: Evaluator, n_workers: int
) -> Iterator[tuple[T, Evaluation]]:
    """Evaluate items in order; cached results are not computed again.

    The ranks of a distributed job take every n-th item; else ``n_workers`` processes or threads
    take a part each, with a module of their own; one worker evaluates here, item by item.
    """
    found: dict[T, Evaluation] = {}
    if evaluate.cache is not None:
        kept = {item: evaluate.cache.find(*trial.key(item)) for item in items}
        found = {item: Evaluation(**one) for item, one in kept.items() if one is not None}
    missing = [item for item in items if item not in found]
    n_workers = min(n_workers, len(missing))
    if missing and evaluate.objective.n_apart > 1:
        mine = missing[rank() :: world_size()]
        for part in all_gather(evaluate_each(trial.only(mine), mine, evaluate) if mine else {}):
            found |= part
    elif n_workers > 1:
        parts = [part.tolist() for part in np.array_split(np.array(missing, object), n_workers)]
        threads = torch.get_num_threads()
        tasks = (delayed(run_in_worker)(trial.only(p), p, evaluate, threads) for p in parts)
        for part, counts in Parallel(n_jobs=n_workers)(tasks):
            evaluate.objective.counts.add(counts)
            found |= part
    for item in items:
        yield item, found.pop(item) if item in found else evaluate_one(trial, item, evaluate)


def evaluate_one(trial: Trial[T], item: T, evaluate: Evaluator) -> Evaluation:
    """Evaluate an item and keep the result."""
    found = trial(item, evaluate)
    if evaluate.cache is not None:
        evaluate.cache.keep(vars(found), *trial.key(item), everywhere=True)
    return found


def evaluate_each(trial: Trial[T], items: Sequence[T], evaluate: Evaluator) -> dict[T, Evaluation]:
    """Evaluate items one after the other."""
    return {item: evaluate_one(trial, item, evaluate) for item in items}


def run_in_worker(
    trial: Trial[T], items: Sequence[T], evaluate: Evaluator, threads: int
) -> tuple[dict[T, Evaluation], Counts]:
    """Evaluate items in a process or thread with as many threads as the process that sent them."""
    torch.set_num_threads(threads)
    evaluate = evaluate.own()
    return evaluate_each(trial, items, evaluate), evaluate.objective.counts
