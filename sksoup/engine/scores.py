"""Held-out scores of the module, stopped early if the other rows can't change the decision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..data.outputs import Task
from ..data.rows import HeldOut, take_rows, to_tensor
from ..data.tokens import IGNORED, LANGUAGE_MODELING, row_losses
from ..runtime.cache import Cache
from .objective import Objective

WORST = 1e6  # loss of a token, where it is not finite or more
SLACK = 1e-9  # far above what float64 sums of penalties are off by, far below what a row is worth


@dataclass(frozen=True)
class RowScore:
    """A score that is `top` minus a sum of penalties >= 0, one per row; on the CPU.

    For accuracy and R² `top` is 1. For language modeling the penalties are losses and `top` is 0; a
    loss has no upper bound, so only the rows seen so far count against a candidate.
    """

    task: Task
    y: torch.Tensor  # (N,) class indices, else (N, n_outputs)
    share: torch.Tensor  # (N,), each row's part of the whole weight; sums to 1
    variance: torch.Tensor  # (n_outputs,), of the targets of a regression; unused elsewhere
    top: float = 1.0  # the highest score there is

    @classmethod
    def of(
        cls, task: Task, y: torch.Tensor, amounts: NDArray[np.float64] | None
    ) -> RowScore | None:
        """The default score of a task; None where it is no such sum (R² of constant targets)."""
        y = y.detach().cpu()
        share = to_tensor(np.ones(len(y)) if amounts is None else amounts).double()
        share = share / share.sum()
        variance = torch.ones(1, dtype=torch.float64)
        if task == "regression":
            y = y.double().reshape(len(y), -1)
            variance = share @ (y - share @ y).square()  # (n_outputs,)
            if len(y) < 2 or bool((variance <= 1e-12 * (share @ y.square())).any()):
                return None
        return cls(task, y, share, variance, 0.0 if task == LANGUAGE_MODELING else 1.0)

    @property
    def most(self) -> float:
        """The largest possible penalty of a row."""
        is_bounded = self.task not in ("regression", LANGUAGE_MODELING)
        return float(self.share.max()) if is_bounded else math.inf

    def penalties(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(n,): what these rows take away from a score of 1, for their outputs (n, ...)."""
        y = self.y[rows]
        if self.task == LANGUAGE_MODELING:
            labels = y.to(outputs.device)
            n_labels = (y != IGNORED).sum(dim=1).clamp_min(1)
            each = row_losses(outputs, labels).double().cpu() / n_labels
            # of a run that diverged: a recipe holds finite scores only
            each = each.nan_to_num(nan=WORST, posinf=WORST).clamp_max(WORST)
            return self.share[rows] * each
        if self.task == "regression":
            error = y - outputs.double().reshape(y.shape)
            return self.share[rows] * (error.square() / self.variance).mean(dim=1)
        if self.task == "classification":
            wrong = outputs.argmax(dim=1) != y
        else:
            wrong = ((outputs > 0) != (y > 0)).reshape(len(y), -1).any(dim=1)
        # an output of NaN is right for no label, as in `margins`
        return self.share[rows] * (wrong | outputs.reshape(len(y), -1).isnan().any(dim=1))

    def margins(self, outputs: torch.Tensor) -> torch.Tensor:
        """(N,): how safely each row is right; small is hard."""
        if self.task == "regression":
            return -self.penalties(outputs, torch.arange(len(self.y)))
        if self.task == "multilabel":
            sides = torch.where(self.y > 0, outputs, -outputs)
            return sides.reshape(len(sides), -1).amin(dim=1)
        labels = self.y.clamp_min(0)[:, None]  # those left out count for nothing
        own = outputs.gather(1, labels)
        others = outputs.scatter(1, labels, -torch.inf).amax(dim=1)
        return own[:, 0] - others

    def standard_error(self, penalties: torch.Tensor) -> float:
        """Standard error of a sum of (differences of) penalties (N,), over draws of the rows."""
        return float((penalties - self.share * penalties.sum()).square().sum().sqrt())


@dataclass(frozen=True)
class Evaluation:
    """A held-out score, or an upper bound that was sufficient for rejection."""

    score: float
    n_rows: int
    is_bound: bool = False
    penalties: torch.Tensor | None = None  # (N,), where the score is a `RowScore`
    margins: torch.Tensor | None = None  # (N,)


class Scorer(Protocol):
    """A metric on the held-out rows, for a module with some weights; greater is better."""

    def __call__(self, module: nn.Module) -> float: ...

    def on(self, rows: NDArray[np.int64]) -> Scorer:
        """The same on some of the rows."""


@dataclass(frozen=True)
class Evaluator:
    """Scores the current weights of the module on the held-out rows."""

    objective: Objective
    data: HeldOut
    batch_size: int | None
    y: NDArray[Any]  # (N, ...), as the user gave it
    weight: NDArray[np.float64] | None  # (N,)
    scorer: Scorer | None = None  # None is the task's score
    cache: Cache | None = None  # of scores on these rows

    @cached_property
    def rows(self) -> RowScore | None:
        """The score as a sum over rows, where it is one."""
        outputs = self.objective.outputs
        if self.scorer is not None or (outputs.is_dense and not outputs.is_text):
            return None
        y = to_tensor(self.y) if outputs.task == "regression" else self.data.y
        return RowScore.of(outputs.task, y, self.amounts)

    @cached_property
    def amounts(self) -> NDArray[np.float64] | None:
        """(N,): weight times labels that count of each row; None where all are equal."""
        if self.data.counted is None:
            return self.weight
        counted = self.data.counted.cpu().numpy().astype(np.float64)
        return counted if self.weight is None else self.weight * counted

    def own(self) -> Self:
        """The same with a module of its own, for use beside others."""
        return replace(self, objective=self.objective.own())

    def on(self, rows: NDArray[np.int64]) -> Self:
        """The same on some of the rows."""
        return replace(
            self,
            data=self.data.select(torch.as_tensor(rows)),
            y=self.y[rows],
            weight=None if self.weight is None else self.weight[rows],
            scorer=None if self.scorer is None else self.scorer.on(rows),
            cache=None if self.cache is None else self.cache.within(rows),
        )

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """Score all rows."""
        n = len(self.data)
        if self.scorer is not None:
            self.objective.counts.rows_forward += n
            return Evaluation(float(self.scorer(self.objective.module)), n)
        if self.objective.outputs.is_text:  # logits of all tokens at once would be huge
            return self.until(-math.inf, torch.arange(n), min(self.batch_size or n, n))
        return self._evaluation(self.objective.outputs_of(self.data, self.batch_size))

    def _evaluation(self, outputs: torch.Tensor) -> Evaluation:
        n, rows, reads = len(outputs), self.rows, self.objective.outputs
        if rows is None or rows.task == "regression":
            score = reads.score(self.y, reads.decode(outputs), self.weight)
        if rows is None:
            return Evaluation(score, n)
        outputs = outputs.cpu()
        penalties = rows.penalties(outputs, torch.arange(n))
        if rows.task != "regression":  # what accuracy_score gives, without checking labels again
            score = float(np.average(penalties.numpy() == 0, weights=self.amounts))
        return Evaluation(score, n, penalties=penalties, margins=rows.margins(outputs))

    @torch.no_grad()
    def until(self, needed: float, order: torch.Tensor, size: int) -> Evaluation:
        """Score the rows in this order until it is certain that less than ``needed`` comes out.

        ``size`` at a time, the last chunk filled up to that; whole minibatches as long as a bound
        can't decide anything, and after three inconclusive checks.
        """
        if self.rows is None:
            raise ValueError("this score has no bound")
        n, seen, n_looks = len(order), 0, 0
        keeps_outputs = not self.objective.outputs.is_text
        outputs: torch.Tensor | None = None
        penalties = torch.zeros(n, dtype=torch.float64)
        bound = self.rows.top
        while seen < n:
            many = self.batch_size or n
            least = (bound - needed) / self.rows.most  # rows, all wrong, before the score is missed
            # after three looks it will most likely be kept: on with whole minibatches
            undecided = least >= many or n_looks >= 3
            step = many if undecided and size < many <= n - seen else size
            part = order[seen : seen + step]
            padded = torch.cat([part, part[:1].expand(step - len(part))])
            chunk = self.objective.forward(take_rows(self.data.X, padded))
            chunk = chunk[: len(part)]
            if keeps_outputs:
                chunk = chunk.cpu()
                outputs = chunk.new_empty((n, *chunk.shape[1:])) if outputs is None else outputs
                outputs[part] = chunk
            penalties[part] = self.rows.penalties(chunk, part)
            bound -= float(penalties[part].sum())
            seen += len(part)
            n_looks += step == size
            if bound < needed - SLACK and seen < n:
                return Evaluation(bound, seen, is_bound=True)
        if not n:
            raise ValueError("there are no held-out rows")
        if outputs is not None:
            return self._evaluation(outputs)
        score = self.rows.top - float(penalties.sum())
        return Evaluation(score, n, penalties=penalties, margins=-penalties)


def evaluate_named(evaluate: Callable[[], Evaluation], what: str) -> Evaluation:
    """Evaluate; errors name what was scored."""
    try:
        found = evaluate()
    except Exception as error:
        error.add_note(f"This was raised while {what!r} was scored on the held-out rows.")
        raise
    if math.isnan(found.score):
        raise ValueError(
            f"The held-out score of {what!r} is not a number on these rows (n_samples = "
            f"{found.n_rows}), so it can't be compared. Change scoring, or hold out rows it is "
            f"defined on."
        )
    return found
