"""Greedy-Soup: keep what does not lower the held-out score [W22, Recipe 1]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from numpy.typing import ArrayLike, NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.survey import judge
from ..data.outputs import Task
from ..data.split import split_rows
from ..engine.batch_norm import BatchNormPolicy
from ..engine.objective import Forward
from ..engine.problem import Found, Problem, Ranking, rank_checkpoints
from ..engine.scores import Evaluation, Evaluator, RowScore
from ..mixing.mix import mix
from ..runtime.distributed import broadcast
from .base import BaseSoup
from .candidates import Candidates
from .validation import check_finite, check_flag, check_fraction

__all__ = ["GreedySoup"]


def greedy(
    order: list[int],
    evaluate: Callable[[list[int], float, Evaluation | None], Evaluation],
    min_improvement: float,
    on_step: Callable[[list[int]], None] = lambda ingredients: None,
) -> tuple[list[int], list[tuple[int, Evaluation, bool]]]:
    """Recipe 1: try the candidates in order, keep one if the mean of the kept is not worse.

    ``evaluate(ingredients, needed, soup)`` gives the score of their mean, or a bound for it that
    is below what is needed; ``soup`` is the evaluation of the ingredients kept so far.
    """
    ingredients = [order[0]]
    soup = evaluate(ingredients, -math.inf, None)
    path = [(order[0], soup, True)]
    on_step(ingredients)
    for candidate in order[1:]:
        needed = soup.score + min_improvement
        found = evaluate([*ingredients, candidate], needed, soup)
        kept = found.score >= needed  # a bound is below
        path.append((candidate, found, kept))
        if kept:
            ingredients, soup = [*ingredients, candidate], found
        on_step(ingredients)
    return ingredients, path


def uniform_coef(ingredients: list[int], n_checkpoints: int) -> NDArray[np.float64]:
    """(1, K): equal coefficients for the ingredients."""
    coef = np.zeros((1, n_checkpoints))
    coef[0, ingredients] = 1 / len(ingredients)
    return coef


@dataclass(eq=False, repr=False)
class GreedySoup(BaseSoup):
    r"""Average the checkpoints that help, found greedily on the held-out score.

    Tries the checkpoints by held-out score, best first: each stays if the mean of those kept,
    :math:`w = \frac{1}{|S|} \sum_{k \in S} w_k`, scores at least as high with it as without. So the
    soup scores at least as high as the best checkpoint on the rows that decide (with scores of its
    own and ``min_improvement`` of 0 or more; but for rounding, of which a warning tells).

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    scoring : str, callable or None, default=None
        What the search maximises, such as ``"f1_macro"``: a scorer of scikit-learn, greater is
        better; by default accuracy or R², by ``task``, which is what ``score`` returns always.
    min_improvement : float, default=0.0
        How much a checkpoint must raise the held-out score to be kept; 0 keeps ties, as Recipe 1.
    early_rejection : bool, default=True
        Whether to stop evaluating a candidate once it can't reach the score it needs, for accuracy
        (but of pixels and tokens) and R²; the soup is the same, rejected candidates have a bound
        for a score.
    ranking_fraction : float or None, default=None
        Part of the rows, drawn at random and stratified by label, that only rank the checkpoints;
        the others only decide what is kept. None uses all rows for both, as Recipe 1. Not used if
        the collection has ``scores``.
    batch_norm : {"average", "recalibrate", "auto"}, default="average"
        Running statistics of BatchNorm: mixed like the weights around them; or re-estimated from
        the held-out rows (for every candidate and the result); or whichever scores better on them,
        mixed on ties.
    forward : callable or None, default=None
        ``(module, X) -> outputs``, by default ``module(X)``, ``**X`` of a dict, ``*X`` of a tuple.
    task : str, default="classification"
        What the outputs mean: "classification", "regression", "multilabel", or "language-modeling"
        (docs: Language models).
    classes : array-like of shape (n_outputs,) or None, default=None
        Labels in output order; by default the names in the module's config (``id2label`` of
        transformers) where ``y`` is texts and it has names, else those of ``y`` sorted, if one per
        output, else 0, 1, ....
    batch_size : int or None, default=128
        Rows per forward pass; None for all at once.
    n_jobs : int or None, default=None
        Checkpoints ranked, and candidates tried, side by side, by joblib; the soup is the same for
        any number. Candidates tried ahead of their turn may be for nothing. The running sum is sent
        to every worker for each, on one machine as a file that joblib maps; a worker holds the
        module and the mean, and reads no file but its candidates', so that a file is read
        ``n_jobs + 4`` times at most.
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.
    shard : {None, "auto"}, default=None
        "auto" spreads the module over the ranks of a distributed job with PyTorch's FSDP2, block by
        block, for models that no device holds (docs: Several devices). None lets every rank hold
        the module, unless it was wrapped already.
    random_state : int, RandomState or None, default=None
        Draws the rows of ``ranking_fraction``; nothing else is random.
    memory : str, path-like, joblib.Memory or None, default=None
        Where scores are kept, so that a fit that was killed goes on where it was.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/n for the n ingredients, 0 elsewhere.
    ingredients_ : tuple of str
        Names of what was kept, in the order it was.
    individual_scores_ : dict of str to float
        Held-out score of each checkpoint.
    path_ : list of dict
        What was tried, in order: ``candidate`` (name), ``score`` of the mean with it, or what it is
        at most (``is_bound``), ``kept``, ``n_rows`` evaluated, ``gain`` over the soup without it,
        and for accuracy and R² the ``standard_error`` of the score and of the gain
        (``gain_standard_error``): a gain of less than about two of them may be luck. None where
        unknown.
    n_rows_evaluated_ : int
        Held-out rows evaluated while trying candidates, (K - 1) N without early rejection.
    module_ : nn.Module
        The soup, in eval mode, on the device.
    layers_ : dict of str to int
        Row of ``coef_`` for every tensor.
    layer_names_ : tuple of str
        Names of the rows.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
    checkpoints_ : CheckpointCollection
        What was mixed.
    history_ : list of dict
        As ``path_``.
    recipe_ : Recipe
        The record that `save` writes.
    warnings_ : tuple of str
        What fitting warned of.
    recalibrated_ : tuple of str
        BatchNorm's tensors that were re-estimated from the held-out rows.
    counts_ : Counts
        Passes and rows, forward and backward, that the fit took.

    Raises
    ------
    ValueError
        ``min_improvement`` is not a finite number, ``ranking_fraction`` is not between 0 and 1, at
        `fit`.

    Warns
    -----
    SoupWarning
        Only the best checkpoint was kept; with how much the others lowered the score and whether
        they look unrelated. Rounding left the soup more than 1e-6 below the score that its last
        ingredient was accepted with; with both scores.

    See Also
    --------
    MEHLSoup : Learns the coefficients instead.

    Notes
    -----
    Cost: K evaluations of N rows for the ranking, none when the collection has ``scores``
    (but one for the best checkpoint), and K - 1 for the candidates. Of these most rows are spared,
    exactly: the rows are evaluated hardest first, by the margin expected of the mean (to first
    order it is the mean of the soup's and, once ranked, the candidate's own), in chunks of N / 16
    rows (at least 32; whole minibatches as long as no bound can decide anything), until even a
    perfect remainder would not reach the score needed.

    A candidate is the mean of a running sum and its file, cast once, so a file is read three times
    at most: to rank it, to try it, to mix it. A fit that is resumed reads a kept one no more often.
    The sum is in float64, in float32 for weights of two bytes or fewer. The soup itself is what
    `mix` gives, which accumulates in float32; with two ingredients or more it is scored once more
    on the rows that decided, N rows.

    Memory, in models of float32: the module, the sum (2), the mean that is loaded (1), and three of
    the largest tensor in float64; K N margins on the CPU. A legacy pickle is whole in memory while
    it is evaluated, one model more.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Recipe 1.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, GreedySoup
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
    >>> for net, scale in zip(nets, [-1.0, 2.0]):
    ...     _ = net.weight.data.copy_(scale * torch.eye(2))
    >>> soup = GreedySoup(CheckpointCollection(nets)).fit(torch.eye(2), torch.tensor([0, 1]))
    >>> soup.ingredients_, soup.coef_.tolist()
    (('checkpoint1', 'checkpoint0'), [0.5, 0.5])
    """

    checkpoints: Any = None
    _: KW_ONLY
    scoring: Any = None
    min_improvement: float = 0.0
    early_rejection: bool = True
    ranking_fraction: float | None = None
    batch_norm: BatchNormPolicy = "average"
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    batch_size: int | None = 128
    n_jobs: int | None = None
    device: str | torch.device = "auto"
    shard: str | None = None
    random_state: Any = None
    memory: Any = None

    def _check_params(self) -> None:
        super()._check_params()
        check_finite(self.min_improvement, "min_improvement")
        check_fraction(self.ranking_fraction, "ranking_fraction")
        check_flag(self.early_rejection, "early_rejection")

    def _search(self, problem: Problem) -> Found:
        is_known = problem.checkpoints.scores is not None
        parts = self._split(problem, is_known)
        n = len(problem.checkpoints)  # the first that is tried was ranked
        self._log_steps(problem, evaluations=n if is_known else 2 * n - 1)
        found = self.find(problem, parts)
        if not is_known:
            self._warn_of_chance(found.attributes["individual_scores_"], parts[0])
        if len(found.attributes["ingredients_"]) == 1 < len(problem.checkpoints):
            self._warn_of_one(problem.checkpoints, found.history)
        return found

    def find(self, problem: Problem, parts: tuple[Evaluator, Evaluator] | None = None) -> Found:
        """The search, without a warning: MEHL-Soup may start at what it finds.

        ``parts`` are what ranks and what accepts, drawn here by default.
        """
        checkpoints = problem.checkpoints
        names, n = checkpoints.names, len(checkpoints)
        if max(effective_n_jobs(self.n_jobs), problem.objective.n_apart) > 1:
            checkpoints.check()  # workers read some each, and can't compare constants
        n_ranked = 0 if checkpoints.scores is not None else n
        to_rank, to_accept = parts or self._split(problem, is_known=not n_ranked)
        with problem.progress("evaluation", n_ranked + n) as step:
            try:
                ranking = rank_checkpoints(problem, step, n_jobs=self.n_jobs, evaluate=to_rank)
            except ValueError:
                checkpoints.check()  # infinite weights are the cause
                raise
            checkpoints.check()  # those that were not read for the ranking
            scores = ranking.scores
            if to_rank is not to_accept:
                ranking = Ranking(scores, None)  # evaluations of other rows accept nothing
            ranked = ranking.order
            candidates = Candidates(
                problem, ranking, ranked, to_accept, effective_n_jobs(self.n_jobs),
                self.batch_norm, bool(self.early_rejection),
            )  # fmt: skip
            ingredients, tried = greedy(
                ranked, candidates, self.min_improvement,
                on_step=lambda kept: step(lambda: mean_of(checkpoints, kept)),
            )  # fmt: skip
        path = describe_path(tried, names, to_accept.rows)
        decided = [found.score for _, found, kept in tried if kept][-1]
        return Found(
            uniform_coef(ingredients, n),
            history=path,
            attributes={
                "individual_scores_": scores,
                "ingredients_": tuple(names[k] for k in ingredients),
                "path_": path,
                "n_rows_evaluated_": sum(found.n_rows for _, found, _ in tried[1:]),
            },
            decided=(to_accept, decided) if len(ingredients) > 1 else None,
        )

    def _split(self, problem: Problem, is_known: bool) -> tuple[Evaluator, Evaluator]:
        """What ranks and what accepts: the same, or each on rows of its own."""
        evaluate = problem.evaluate
        if self.ranking_fraction is None or is_known:
            return evaluate, evaluate
        fraction, amounts = self.ranking_fraction, evaluate.data.amounts
        split = partial(split_rows, evaluate.y, self.task, amounts, fraction, self.random_state)
        if self.random_state is None and problem.cache is not None:  # the rows it began with
            parts = problem.cache(("split", fraction), split)
        else:
            parts = split()
        ranks, accepts = (part.numpy() for part in broadcast(parts))
        return evaluate.on(ranks), evaluate.on(accepts)

    def _warn_of_one(self, checkpoints: CheckpointCollection, path: list[dict[str, Any]]) -> None:
        """Warn that nothing was mixed, and why."""
        best, *others = path
        least = max(others, key=lambda tried: tried["gain"])
        most = min(others, key=lambda tried: tried["gain"])
        related = judge(checkpoints.relations(checkpoints.names))
        bounds = " at most" if any(tried["is_bound"] for tried in others) else ""
        gains = f"{least['gain']:+.4f}"
        if f"{most['gain']:+.4f}" != gains:
            gains += f" ({least['candidate']!r}) to {most['gain']:+.4f} ({most['candidate']!r})"
        who = "each of the others" if len(others) > 1 else repr(least["candidate"])
        self._warn(
            f"Only {best['candidate']!r}, the best checkpoint, is in the greedy soup: {who}, added "
            f"to it, changed its held-out score of {best['score']:.4f} by {gains}{bounds}, where "
            f"{self.min_improvement:g} or more was asked for. path_ has all of them; MEHLSoup "
            f"weighs them instead. {related}"
        )


def mean_of(checkpoints: CheckpointCollection, ingredients: list[int]) -> dict[str, torch.Tensor]:
    """The mean of these checkpoints, in the bits that `mix` gives."""
    return mix(checkpoints, uniform_coef(ingredients, len(checkpoints)))


def describe_path(
    tried: Sequence[tuple[int | None, Evaluation, bool]],
    names: Sequence[str],
    rows: RowScore | None,
) -> list[dict[str, Any]]:
    """``path_``: what was tried, with the gain over the soup at that time and their errors."""
    path: list[dict[str, Any]] = []
    soup: Evaluation | None = None
    for candidate, found, kept in tried:
        record: dict[str, Any] = {
            "candidate": None if candidate is None else names[candidate],
            "score": found.score,
            "is_bound": found.is_bound,
            "kept": kept,
            "n_rows": found.n_rows,
            "gain": None if soup is None else found.score - soup.score,
            "standard_error": None,
            "gain_standard_error": None,
        }
        if rows is not None and found.penalties is not None:
            record["standard_error"] = rows.standard_error(found.penalties)
            if soup is not None and soup.penalties is not None:
                difference = found.penalties - soup.penalties
                record["gain_standard_error"] = rows.standard_error(difference)
        path.append(record)
        if kept:
            soup = found
    return path
