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
from ..exceptions import CheckpointError
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
    """Recipe 1: try the candidates in order, and keep those that do not make the mean worse.

    ``evaluate(ingredients, needed, soup)`` returns the score of their mean, or an upper bound that
    is below ``needed``; ``soup`` is the evaluation of the ingredients kept so far.
    """
    ingredients = [order[0]]
    soup = evaluate(ingredients, -math.inf, None)
    path = [(order[0], soup, True)]
    on_step(ingredients)
    for candidate in order[1:]:
        needed = soup.score + min_improvement
        found = evaluate([*ingredients, candidate], needed, soup)
        kept = found.score >= needed  # an upper bound is always below
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

    Tries the checkpoints in order of their held-out scores, best first. A checkpoint is kept if the
    mean of those kept, :math:`w = \frac{1}{|S|} \sum_{k \in S} w_k`, scores at least as high with
    it as without it. Therefore the soup scores at least as high as the best checkpoint on the rows
    that it was selected on, provided that the collection has no ``scores``, ``ranking_fraction`` is
    None and ``min_improvement`` is not negative. Rounding can cause small exceptions, with a
    warning.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        Checkpoints to mix. They can also be passed to `fit`.
    scoring : str, callable or None, default=None
        The metric to maximize: a scikit-learn scorer such as ``"f1_macro"`` (greater is better). By
        default accuracy or R², depending on ``task``, which `score` returns whatever ``scoring``
        is.
    min_improvement : float, default=0.0
        Minimum increase of the held-out score for a checkpoint to be kept. With 0 ties are kept, as
        in Recipe 1.
    early_rejection : bool, default=True
        Whether to stop evaluating a candidate once it can no longer reach the required score.
        Applies to accuracy (except of pixels and tokens) and R². The soup is the same; the scores
        of rejected candidates in ``path_`` are upper bounds.
    ranking_fraction : float or None, default=None
        Fraction of the rows, drawn at random and stratified by label, that is used only to rank the
        checkpoints; the others are used only to decide which are kept. None uses all rows for both,
        as in Recipe 1. Ignored if the collection has ``scores``.
    batch_norm : {"average", "recalibrate", "auto"}, default="average"
        How the running statistics of BatchNorm are obtained. "average" mixes them with the
        coefficients of the weights around them; "recalibrate" re-estimates them from the held-out
        rows (for every candidate and for the result); "auto" takes whichever of the two scores
        higher on these rows, and "average" if they are equal.
    forward : callable or None, default=None
        Function ``(module, X) -> outputs`` that runs the forward pass. By default ``module(X)``;
        ``module(**X)`` for a dict and ``module(*X)`` for a tuple. Outputs of a classification are
        logits, not probabilities.
    task : str, default="classification"
        How the outputs are interpreted: "classification", "regression", "multilabel", or
        "language-modeling" (see the page "Language models").
    classes : array-like of shape (n_outputs,) or None, default=None
        Labels in the order of the outputs. By default the names in the module's config
        (``id2label`` of transformers) if the config has names and ``y`` holds strings, or these
        names as integers; otherwise the sorted labels of ``y`` if there is one per output;
        otherwise 0, 1, .... Labels of pixels or tokens must be strings or 0, 1, ....
    batch_size : int or None, default=128
        Number of rows per forward pass. None processes all rows at once.
    n_jobs : int or None, default=None
        Number of joblib workers that rank checkpoints and try candidates in parallel. The soup does
        not depend on it. Candidates that are tried in advance may have to be tried again. The
        running sum is sent to every worker for each candidate (on one machine, joblib memory-maps
        it). A worker holds the module and the mean and reads only the files of its candidates, so a
        file is read at most ``n_jobs + 4`` times.
    device : str or torch.device, default="auto"
        Device that the module runs on. "auto" is "cuda" if available, else "mps", else "cpu".
    shard : {None, "auto"}, default=None
        "auto" shards the module across the ranks of a distributed job with PyTorch's FSDP2, block
        by block, for models that do not fit on one device (see the page "Several devices"). With
        None every rank holds the whole module, unless it is already wrapped.
    random_state : int, RandomState or None, default=None
        Seed for drawing the rows of ``ranking_fraction``. Nothing else is random.
    memory : str, path-like, joblib.Memory or None, default=None
        Folder or cache where scores are stored, so that an interrupted fit resumes where it
        stopped.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/n for the n ingredients, 0 elsewhere.
    ingredients_ : tuple of str
        Names of the checkpoints that were kept, in the order in which they were added.
    individual_scores_ : dict of str to float
        Held-out score of each checkpoint.
    path_ : list of dict
        One record per candidate, in order: ``candidate`` (name), ``score`` of the mean with it (an
        upper bound if ``is_bound``), ``kept``, ``n_rows`` evaluated, ``gain`` over the soup without
        it, and for accuracy and R² the ``standard_error`` of the score and ``gain_standard_error``.
        A gain of less than about two standard errors may be due to chance. Unknown values are None.
    n_rows_evaluated_ : int
        Number of held-out rows evaluated while trying candidates; (K - 1) N without early
        rejection.
    module_ : nn.Module
        The soup, in eval mode, on the device.
    layers_ : dict of str to int
        For every tensor name, the index of its row in a two-dimensional ``coef_``.
    layer_names_ : tuple of str
        Names of the layers: the rows of a two-dimensional ``coef_``.
    classes_ : ndarray of shape (n_outputs,)
        Sorted labels (classification only), in the order of the columns of `predict_proba`;
        ``recipe_.classes`` has the order of the outputs. For multi-label, a list of arrays [0, 1].
    checkpoints_ : CheckpointCollection
        The checkpoints that were mixed.
    history_ : list of dict
        Same as ``path_``.
    recipe_ : Recipe
        Record of the soup, which `save` writes.
    warnings_ : tuple of str
        Messages of the warnings that `fit` issued.
    recalibrated_ : tuple of str
        Names of the BatchNorm tensors that were re-estimated from the held-out rows.
    counts_ : Counts
        Numbers of forward and backward passes, and of rows in them, during `fit`.

    Raises
    ------
    ValueError
        Raised by `fit` if ``min_improvement`` is not finite or ``ranking_fraction`` is not between
        0 and 1.

    Warns
    -----
    SoupWarning
        Only the best checkpoint was kept; the message says how much the others lowered the score
        and whether they look unrelated. Or, because of rounding, the soup scores more than 1e-6
        less than the mean did when its last ingredient was accepted.

    See Also
    --------
    MEHLSoup : Learns the coefficients instead.

    Notes
    -----
    Cost: K evaluations of N rows for the ranking (one, for the best checkpoint, if the collection
    has ``scores``) and K - 1 for the candidates. Early rejection skips most of the latter without
    changing the result: rows are evaluated hardest first, in chunks of N / 16 rows (at least 32;
    whole minibatches as long as no bound can decide), until the required score is out of reach even
    if all remaining rows were predicted perfectly. Rows are ordered by the expected margin of the
    mean, which to first order is the mean of the margins of the soup and, if it was ranked, of the
    candidate.

    A candidate is computed from a running sum and its file, and cast once, so a file is read at
    most three times: to rank it, to try it and to mix it. This also holds for a fit that is
    resumed. The sum is in float64, or in float32 for weights of at most two bytes. The soup itself
    is the result of `mix`, which accumulates in float32; with two or more ingredients it is scored
    once more on the N rows that it was selected on.

    Memory, in float32 models: the module (1), the sum (2) and the loaded mean (1), plus three
    copies of the largest tensor in float64 and K N margins on the CPU. A legacy pickle is copied
    while it is evaluated, which takes one more model.

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
        """Search without warnings, because MEHL-Soup may start from the result.

        ``parts`` are the evaluators that rank and accept; by default they are drawn here.
        """
        checkpoints = problem.checkpoints
        names, n = checkpoints.names, len(checkpoints)
        if max(effective_n_jobs(self.n_jobs), problem.objective.n_apart) > 1:
            checkpoints.check()  # each worker reads only some, so it can't compare constants
        n_ranked = 0 if checkpoints.scores is not None else n
        to_rank, to_accept = parts or self._split(problem, is_known=not n_ranked)
        with problem.progress("evaluation", n_ranked + n) as step:
            try:
                ranking = rank_checkpoints(problem, step, n_jobs=self.n_jobs, evaluate=to_rank)
            except ValueError as error:
                if not isinstance(error, CheckpointError):  # which one rank may have alone
                    checkpoints.check()  # names the infinite weights that caused it
                raise
            checkpoints.check()  # reads those that the ranking did not read
            scores = ranking.scores
            if to_rank is not to_accept:
                ranking = Ranking(scores, None)  # evaluations on other rows can't be reused
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
        """The evaluators that rank and accept: the same one, or two with separate rows."""
        evaluate = problem.evaluate
        if self.ranking_fraction is None or is_known:
            return evaluate, evaluate
        fraction, amounts = self.ranking_fraction, evaluate.data.amounts
        split = partial(split_rows, evaluate.y, self.task, amounts, fraction, self.random_state)
        if self.random_state is None and problem.cache is not None:  # the same rows if resumed
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
            f"Only {best['candidate']!r}, the best checkpoint, is in the greedy soup: adding {who} "
            f"changed its held-out score of {best['score']:.4f} by {gains}{bounds}, and "
            f"{self.min_improvement:g} or more is needed (min_improvement). path_ lists all of "
            f"them; MEHLSoup learns coefficients instead. {related}"
        )


def mean_of(checkpoints: CheckpointCollection, ingredients: list[int]) -> dict[str, torch.Tensor]:
    """The mean of these checkpoints, bit for bit as `mix` computes it."""
    return mix(checkpoints, uniform_coef(ingredients, len(checkpoints)))


def describe_path(
    tried: Sequence[tuple[int | None, Evaluation, bool]],
    names: Sequence[str],
    rows: RowScore | None,
) -> list[dict[str, Any]]:
    """``path_``: the candidates, with gains over the soup at that time and standard errors."""
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
