"""Pruned soup: start from the mean of all checkpoints and drop those that do not help."""

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
from ..runtime.fingerprint import fingerprint
from .base import BaseSoup
from .candidates import CandidateTrial
from .greedy import describe_path, mean_of, uniform_coef
from .validation import check_finite, check_flag

__all__ = ["PrunedSoup"]

NOTHING = -1  # no candidate is left out
Trial = tuple[int | None, Evaluation, bool]  # candidate (None: all are in), its evaluation, dropped


def prune(
    order: Sequence[int],
    evaluate: Callable[[list[int], int | None, float, Evaluation | None], Evaluation],
    min_improvement: float,
    on_step: Callable[[list[int]], None] = lambda dropped: None,
) -> tuple[list[int], list[Trial]]:
    """Leave out each candidate in turn, and drop it if the mean of the others is not worse.

    ``evaluate(dropped, candidate, needed, soup)`` returns the score of the mean without those
    dropped and the candidate, or an upper bound that is below ``needed``.
    """
    dropped: list[int] = []
    soup = evaluate(dropped, None, -math.inf, None)
    path: list[Trial] = [(None, soup, True)]
    for candidate in order:
        needed = soup.score + min_improvement
        found = evaluate(dropped, candidate, needed, soup)
        is_dropped = found.score >= needed  # an upper bound is always below
        path.append((candidate, found, is_dropped))
        if is_dropped:
            dropped, soup = [*dropped, candidate], found
        on_step(dropped)
    return dropped, path


@dataclass(eq=False, repr=False)
class PrunedSoup(BaseSoup):
    r"""Average all checkpoints except those whose removal does not lower the held-out score.

    Starts from the mean of all checkpoints and tries to leave out each of them, worst first. A
    checkpoint is dropped if the mean of the others scores at least as high without it; the best
    checkpoint is always kept. Therefore the soup scores at least as high as `UniformSoup` on the
    held-out rows, but it can score lower than the best checkpoint, from which `GreedySoup` starts.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        Checkpoints to mix. They can also be passed to `fit`.
    scoring : str, callable or None, default=None
        The metric to maximize: a scikit-learn scorer such as ``"f1_macro"`` (greater is better). By
        default accuracy or R², depending on ``task``, which `score` returns whatever ``scoring``
        is.
    min_improvement : float, default=0.0
        Minimum increase of the held-out score for a checkpoint to be dropped. With 0 ties are
        dropped, as in the authors' code.
    early_rejection : bool, default=True
        Whether to stop evaluating a candidate once it can no longer reach the required score.
        Applies to accuracy (except of pixels and tokens) and R². The soup is the same.
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
        Number of joblib workers that rank checkpoints in parallel. The soup does not depend on it.
    device : str or torch.device, default="auto"
        Device that the module runs on. "auto" is "cuda" if available, else "mps", else "cpu".
    memory : str, path-like, joblib.Memory or None, default=None
        Folder or cache where scores are stored, so that an interrupted fit resumes where it
        stopped.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/n for the n ingredients, 0 for the checkpoints that were dropped.
    ingredients_ : tuple of str
        Names of the checkpoints that were kept, in the order of the collection.
    individual_scores_ : dict of str to float
        Held-out score of each checkpoint.
    path_ : list of dict
        One record per trial, in order: ``candidate`` (name; None for the first trial, the mean of
        all), ``score`` of the mean without it (an upper bound if ``is_bound``), ``dropped``,
        ``n_rows`` evaluated, ``gain`` over the soup with it, and for accuracy and R² the
        ``standard_error`` of the score and ``gain_standard_error``. Unknown values are None.
    n_rows_evaluated_ : int
        Number of held-out rows evaluated while trying candidates, including the mean of all.
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
        Raised by `fit` if ``min_improvement`` is not finite.

    Warns
    -----
    SoupWarning
        Because of rounding, the soup scores more than 1e-6 less than the mean that was accepted.

    See Also
    --------
    GreedySoup : Start from the best checkpoint and add those that help.

    Notes
    -----
    Cost: K evaluations of N rows for the ranking (none if the collection has ``scores``), one for
    the mean of all and K - 1 for the candidates, of which early rejection skips most rows as in
    `GreedySoup`. A file is read at most five times: to rank it, twice for the mean of all and its
    sum, to leave it out, and to drop it or to mix the soup. If a checkpoint has values so large
    that the others are lost in rounding, the others are read again. Memory: as for `GreedySoup`.

    References
    ----------
    Dansereau et al., *Model soups to increase inference without increasing compute time*, 2023,
    arXiv:2301.10092; here the candidates are sorted by score.

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
            checkpoints.check()  # reads those that the ranking did not read
            if n_ranked:
                self._warn_of_chance(ranking.scores, problem.evaluate)
            worst_first = ranking.order[:0:-1]  # the best stays
            mean = RunningMean(checkpoints.layout)
            identities = [] if problem.cache is None else [*map(checkpoints.identity, names)]
            digest = fingerprint(identities)

            def evaluate(
                dropped: list[int], candidate: int | None, needed: float, soup: Evaluation | None
            ) -> Evaluation:
                trial = RemovalTrial(
                    checkpoints, dict(enumerate(names)), problem.data, ranking.margins,
                    self.batch_norm, bool(self.early_rejection), kept_of(n, dropped), digest,
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
    gone = {*dropped}
    return [k for k in range(n) if k not in gone]


@dataclass(frozen=True)
class RemovalTrial(CandidateTrial):
    """Scores the mean of those kept without one of them, or of all of them (`NOTHING`)."""

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
        score = partial(self._score, candidate, evaluate)
        return evaluate_named(score, f"the mean of those kept without {name}")

    def key(self, candidate: int) -> tuple[Any, ...]:
        settings = self.needed, self._order(candidate), self.early_rejection, self.batch_norm
        return "without", self.digest, self.dropped, candidate, *settings

    def only(self, candidates: Sequence[int]) -> Self:
        return self

    def _n_mixed(self, candidate: int) -> int:
        return len(self.kept) - (candidate != NOTHING)

    def _order(self, candidate: int) -> torch.Tensor | None:
        """Order rows, hardest first, by the expected margins of the mean without the candidate."""
        if self.soup is None or self.soup.margins is None:
            return None
        margins, own = self.soup.margins, self.margins.get(self.names.get(candidate, ""))
        if own is not None:
            margins = margins + (margins - own) / max(1, self._n_mixed(candidate))
        return margins.argsort(stable=True)
