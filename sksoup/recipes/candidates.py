"""Evaluate the candidates of a greedy soup one by one, or several in advance in parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..checkpoints.collection import CheckpointCollection
from ..data.rows import HeldOut
from ..engine.batch_norm import BatchNormPolicy, can_recalibrate, recalibrate
from ..engine.objective import load_weights
from ..engine.parallel import evaluate_all
from ..engine.problem import Problem, Ranking
from ..engine.scores import Evaluation, Evaluator, evaluate_named
from ..mixing.running_mean import RunningMean
from ..runtime.fingerprint import fingerprint


class Candidates:
    """Evaluates candidates in order; with several workers, some of them in advance."""

    def __init__(
        self,
        problem: Problem,
        ranking: Ranking,
        ranked: list[int],
        evaluate: Evaluator,
        n_workers: int,
        batch_norm: BatchNormPolicy,
        early_rejection: bool,
    ) -> None:
        self.problem, self.ranking, self.ranked = problem, ranking, ranked
        self.evaluate, self.n_workers = evaluate, n_workers
        self.batch_norm, self.early_rejection = batch_norm, early_rejection
        self.mean = RunningMean(problem.checkpoints.layout)
        self.ahead: dict[int, Evaluation] = {}  # evaluated in advance, with the current soup
        self.digests: list[str] = []  # of the soup after each kept candidate

    def __call__(
        self, ingredients: list[int], needed: float, soup: Evaluation | None
    ) -> Evaluation:
        *kept, candidate = ingredients
        if soup is None and self.ranking.best is not None:
            return self.ranking.best
        if candidate not in self.ahead:
            checkpoints = self.problem.checkpoints
            n_ahead = 1 if soup is None else max(self.n_workers, self.evaluate.objective.n_apart)
            following = self.ranked[self.ranked.index(candidate) :]
            for later in following[n_ahead : n_ahead + 1]:
                checkpoints.warm(checkpoints.names[later])
            trial = CandidateTrial(
                checkpoints, dict(enumerate(checkpoints.names)), self.problem.data,
                self.ranking.margins, self.batch_norm, self.early_rejection,
                kept, self._digest(kept), self.mean, needed, soup, is_alone=n_ahead == 1,
            )  # fmt: skip
            found = evaluate_all(trial, following[:n_ahead], self.evaluate, self.n_workers)
            self.ahead.update(found)
        evaluation = self.ahead.pop(candidate)
        if evaluation.score >= needed:
            self.ahead.clear()  # these were evaluated without the new ingredient
        return evaluation

    def _digest(self, kept: list[int]) -> str:
        """Cache keys of the current soup; they depend on the order, in which sums are rounded."""
        checkpoints, digests = self.problem.checkpoints, self.digests
        if self.evaluate.cache is None:
            return ""
        if not digests:  # sums are in dtypes promoted over the collection
            digests.append(fingerprint([info.dtype for info in checkpoints.layout.values()]))
        for i in range(len(digests) - 1, len(kept)):
            leads = kept[i] == min(kept[: i + 1])  # integer tensors are taken from this one
            own = checkpoints.identity(checkpoints.names[kept[i]])
            digests.append(fingerprint(digests[-1], own, leads))
        return digests[-1]


@dataclass(frozen=True)
class CandidateTrial:
    """Scores the mean of a soup's ingredients and one candidate."""

    checkpoints: CheckpointCollection
    names: Mapping[int, str]  # of the candidates
    data: HeldOut  # all rows, from which BatchNorm's statistics are re-estimated
    margins: Mapping[str, torch.Tensor]  # of single checkpoints, where known
    batch_norm: BatchNormPolicy
    early_rejection: bool
    kept: list[int]
    digest: str  # of the kept ingredients, if there is a cache
    mean: RunningMean  # updated with the kept ingredients when a candidate is evaluated
    needed: float
    soup: Evaluation | None  # of the kept ingredients; None for the first candidate
    is_alone: bool  # no earlier candidate is undecided: can be added at once if it scores enough

    def __call__(self, candidate: int, evaluate: Evaluator) -> Evaluation:
        self.mean.extend(self.checkpoints, self.kept)
        name, score = self.names[candidate], partial(self._score, candidate, evaluate)
        with self.checkpoints.open(name) as read:
            load_weights(evaluate.objective.module, self.mean.mean_with(candidate, read))
            found = evaluate_named(score, name)
            if self.is_alone and found.score >= self.needed:
                self.mean.add(candidate, read)  # while its file is open
        return found

    def key(self, candidate: int) -> tuple[Any, ...]:
        own = self.checkpoints.identity(self.names[candidate])
        leads = candidate < min(self.kept, default=candidate)
        settings = self.needed, self._order(candidate), self.early_rejection, self.batch_norm
        return "candidate", self.digest, own, leads, *settings

    def only(self, candidates: Sequence[int]) -> CandidateTrial:
        self.mean.extend(self.checkpoints, self.kept)  # once, not in every worker
        names = {k: self.names[k] for k in candidates}
        return replace(
            self,
            checkpoints=self.checkpoints.select(names.values()),
            names=names,
            margins={n: m for n, m in self.margins.items() if n in names.values()},
        )

    def _n_mixed(self, candidate: int) -> int:
        """The number of checkpoints in the mean that is scored."""
        return len(self.kept) + 1

    def _order(self, candidate: int) -> torch.Tensor | None:
        own = self.margins.get(self.names[candidate])
        return hardest_first(self.soup, own, self._n_mixed(candidate))

    def _score(self, candidate: int, evaluate: Evaluator) -> Evaluation:
        """Evaluate with mixed or re-estimated BatchNorm statistics, or the better of the two.

        Those of a single checkpoint are its own.
        """
        order = self._order(candidate)

        def score() -> Evaluation:
            if not self.early_rejection or order is None:
                return evaluate()
            n = len(order)
            # rows to evaluate before the bound is checked again
            size = min(max(32, -(-n // 16)), n, evaluate.batch_size or n)
            return evaluate.until(self.needed, order, size)

        objective, batch_size = evaluate.objective, evaluate.batch_size
        if (
            self._n_mixed(candidate) == 1
            or self.batch_norm == "average"
            or not can_recalibrate(objective.module, len(self.data), batch_size)
        ):
            return score()
        mixed = score() if self.batch_norm == "auto" else None
        recalibrate(objective, self.data, batch_size)
        found = score()
        if mixed is None:
            return found
        better = found if found.score > mixed.score else mixed
        return replace(better, n_rows=found.n_rows + mixed.n_rows)


def hardest_first(
    soup: Evaluation | None, own: torch.Tensor | None, n_ingredients: int
) -> torch.Tensor | None:
    """Order the rows by the expected margins of a candidate; None if no margins are known."""
    if soup is None or soup.margins is None:
        return None
    margins = soup.margins
    if own is not None:  # margins of the candidate; outputs are linear in weights to first order
        margins = margins + (own - margins) / n_ingredients
    return margins.argsort(stable=True)
