"""Pruned soup: start from the mean of all, and drop what the mean is better without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Self

import torch
from numpy.typing import ArrayLike

from ..data.outputs import Task
from ..engine.batch_norm import BatchNormPolicy
from ..engine.objective import Forward, load_weights
from ..engine.parallel import evaluate_all
from ..engine.problem import Found, Problem, rank_checkpoints
from ..engine.scores import Evaluation, Evaluator, evaluate_named
from ..mixing.running_mean import RunningMean
from .base import BaseSoup
from .candidates import CandidateTrial
from .greedy import describe_path, mean_of, uniform_coef
from .validation import check_finite, check_flag

__all__ = ["PrunedSoup"]

NOTHING = -1  # to leave out
Trial = tuple[int | None, Evaluation, bool]  # what was left out (None: nothing), how that scored


def prune(
    order: Sequence[int],
    evaluate: Callable[[list[int], int | None, float, Evaluation | None], Evaluation],
    min_improvement: float,
    on_step: Callable[[list[int]], None] = lambda dropped: None,
) -> tuple[list[int], list[Trial]]:
    """Leave out each candidate in turn, for good if the mean of the others is not worse.

    ``evaluate(dropped, candidate, needed, soup)`` gives the score of the mean without those
    dropped and the candidate, or a bound for it that is below what is needed.
    """
    dropped: list[int] = []
    soup = evaluate(dropped, None, -math.inf, None)
    path: list[Trial] = [(None, soup, True)]
    for candidate in order:
        needed = soup.score + min_improvement
        found = evaluate(dropped, candidate, needed, soup)
        is_dropped = found.score >= needed  # a bound is below
        path.append((candidate, found, is_dropped))
        if is_dropped:
            dropped, soup = [*dropped, candidate], found
        on_step(dropped)
    return dropped, path


@dataclass(eq=False, repr=False)
class PrunedSoup(BaseSoup):
    r"""Average all checkpoints but those that the mean is better without.

    Starts from the mean of all, and tries to leave out each checkpoint, worst first: it is dropped
    if the mean of the others scores at least as high. The best checkpoint stays. So the soup scores
    at least as high as `UniformSoup` on the held-out rows, but maybe lower than the best
    checkpoint, which `GreedySoup` begins with.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    scoring : str, callable or None, default=None
        What the search maximises, such as ``"f1_macro"``: a scorer of scikit-learn, greater is
        better; by default accuracy or R², by ``task``, which is what ``score`` returns always.
    min_improvement : float, default=0.0
        How much dropping a checkpoint must raise the held-out score; 0 drops on ties, as the
        authors do.
    early_rejection : bool, default=True
        Whether to stop evaluating once the score that is needed can't be reached, for accuracy
        (but of pixels and tokens) and R²; the soup is the same.
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
        Checkpoints ranked side by side, by joblib; the soup is the same for any number.
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.
    memory : str, path-like, joblib.Memory or None, default=None
        Where scores are kept, so that a fit that was killed goes on where it was.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/n for the n ingredients, 0 for what was dropped.
    ingredients_ : tuple of str
        Names of what was kept, in the collection's order.
    individual_scores_ : dict of str to float
        Held-out score of each checkpoint.
    path_ : list of dict
        What was tried, in order: ``candidate`` (name; None first, for the mean of all), ``score``
        of the mean without it, or what it is at most (``is_bound``), ``dropped``, ``n_rows``
        evaluated, ``gain`` over the soup with it, and for accuracy and R² the ``standard_error`` of
        the score and of the gain (``gain_standard_error``). None where unknown.
    n_rows_evaluated_ : int
        Held-out rows evaluated while trying candidates, the mean of all included.
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
        ``min_improvement`` is not a finite number, at `fit`.

    Warns
    -----
    SoupWarning
        Rounding left the soup more than 1e-6 below the score that it was accepted with.

    See Also
    --------
    GreedySoup : Starts from the best checkpoint, and adds what helps.

    Notes
    -----
    Cost: K evaluations of N rows for the ranking, none when the collection has ``scores``, one of
    the mean of all, and K - 1 for the candidates, most of whose rows are spared, exactly, as in
    `GreedySoup`. A file is read five times at most: to rank it, twice for the mean of all and its
    sum, to leave it out, and to drop it or to mix the soup; all others are read anew where one is
    so large that they are lost in the rounding of the sum. Memory: as `GreedySoup`.

    References
    ----------
    Dansereau et al., *Model soups to increase inference without increasing compute time*, 2023,
    arXiv:2301.10092, with candidates sorted.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, PrunedSoup
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(3)]
    >>> for net, scale in zip(nets, [2.0, -5.0, 1.0]):
    ...     _ = net.weight.data.copy_(scale * torch.eye(2))
    >>> soup = PrunedSoup(CheckpointCollection(nets)).fit(torch.eye(2), torch.tensor([0, 1]))
    >>> soup.ingredients_, soup.coef_.tolist()
    (('checkpoint0',), [1.0, 0.0, 0.0])
    """

    checkpoints: Any = None
    _: KW_ONLY
    scoring: Any = None
    min_improvement: float = 0.0
    early_rejection: bool = True
    batch_norm: BatchNormPolicy = "average"
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    batch_size: int | None = 128
    n_jobs: int | None = None
    device: str | torch.device = "auto"
    memory: Any = None

    def _check_params(self) -> None:
        super()._check_params()
        check_finite(self.min_improvement, "min_improvement")
        check_flag(self.early_rejection, "early_rejection")

    def _search(self, problem: Problem) -> Found:
        checkpoints = problem.checkpoints
        names, n = checkpoints.names, len(checkpoints)
        n_ranked = 0 if checkpoints.scores is not None else n
        self._log_steps(problem, evaluations=n_ranked + n)
        with problem.progress("evaluation", n_ranked + n - 1) as step:
            ranking = rank_checkpoints(problem, step, n_jobs=self.n_jobs)
            checkpoints.check()  # those that were not read for the ranking
            if n_ranked:
                self._warn_of_chance(ranking.scores, problem.evaluate)
            worst_first = ranking.order[:0:-1]  # the best stays
            mean = RunningMean(checkpoints.layout)

            def evaluate(
                dropped: list[int], candidate: int | None, needed: float, soup: Evaluation | None
            ) -> Evaluation:
                trial = RemovalTrial(
                    checkpoints, dict(enumerate(names)), problem.data, ranking.margins,
                    self.batch_norm, bool(self.early_rejection), kept_of(n, dropped), "",
                    mean, needed, soup, is_alone=True, dropped=dropped,
                )  # fmt: skip
                item = NOTHING if candidate is None else candidate
                ((_, found),) = evaluate_all(trial, [item], problem.evaluate, 1)
                return found

            dropped, tried = prune(
                worst_first, evaluate, self.min_improvement,
                on_step=lambda dropped: step(lambda: mean_of(checkpoints, kept_of(n, dropped))),
            )  # fmt: skip
        path = describe_path(tried, names, problem.evaluate.rows)
        for record in path:
            record["dropped"] = record.pop("kept") and record["candidate"] is not None
        kept = kept_of(n, dropped)
        decided = [found.score for _, found, is_accepted in tried if is_accepted][-1]
        return Found(
            uniform_coef(kept, n),
            history=path,
            attributes={
                "individual_scores_": ranking.scores,
                "ingredients_": tuple(names[k] for k in kept),
                "path_": path,
                "n_rows_evaluated_": sum(found.n_rows for _, found, _ in tried),
            },
            decided=(problem.evaluate, decided),
        )


def kept_of(n: int, dropped: list[int]) -> list[int]:
    return [k for k in range(n) if k not in dropped]


@dataclass(frozen=True)
class RemovalTrial(CandidateTrial):
    """Scores the mean of what is kept, without one of them; or without `NOTHING`."""

    dropped: list[int]

    def __call__(self, candidate: int, evaluate: Evaluator) -> Evaluation:
        name, module = self.names.get(candidate, "nothing"), evaluate.objective.module
        if candidate == NOTHING:
            load_weights(module, mean_of(self.checkpoints, self.kept))
        else:
            self.mean.leave_out(self.checkpoints, self.dropped)
            with self.checkpoints.open(name) as read:
                weights = self.mean.mean_without(read)
            if weights is None:
                weights = mean_of(self.checkpoints, [k for k in self.kept if k != candidate])
            load_weights(module, weights)
        score = partial(self._score, self._order(candidate), evaluate)
        return evaluate_named(score, f"the mean of those kept without {name}")

    def key(self, candidate: int) -> tuple[Any, ...]:
        identities = [self.checkpoints.identity(name) for name in self.names.values()]
        settings = self.needed, self._order(candidate), self.early_rejection, self.batch_norm
        return "without", identities, self.dropped, candidate, *settings

    def only(self, candidates: Sequence[int]) -> Self:
        return self

    def _order(self, candidate: int) -> torch.Tensor | None:
        """Hardest rows first, by the margins expected of the mean without the candidate."""
        if self.soup is None or self.soup.margins is None:
            return None
        margins, own = self.soup.margins, self.margins.get(self.names.get(candidate, ""))
        if own is not None:
            margins = margins + (margins - own) / max(1, len(self.kept) - 1)
        return margins.argsort(stable=True)
