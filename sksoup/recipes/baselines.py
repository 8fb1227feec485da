"""The systems that search for nothing: uniform soup, best checkpoint, ensemble of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.outputs import Task
from ..data.rows import resolve_device
from ..engine.batch_norm import BatchNormPolicy
from ..engine.objective import Forward, load_weights, prepare_module
from ..engine.problem import Found, Problem, rank_checkpoints
from .base import BaseSoup

__all__ = ["BestCheckpoint", "CheckpointEnsemble", "UniformSoup"]


@dataclass(eq=False, repr=False)
class UniformSoup(BaseSoup):
    r"""Average all checkpoints with equal coefficients.

    :math:`w = \frac{1}{K} \sum_k w_k`. The held-out data fixes only the labels.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    batch_norm : {"average", "recalibrate", "auto"}, default="average"
        Running statistics of BatchNorm: mixed like the weights around them; or re-estimated from
        the held-out rows (for the result); or whichever scores better on them, mixed on ties.
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
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.
    shard : {None, "auto"}, default=None
        "auto" spreads the module over the ranks of a distributed job with PyTorch's FSDP2, block by
        block, for models that no device holds (docs: Several devices). None lets every rank hold
        the module, unless it was wrapped already.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/K each.
    module_ : nn.Module
        The soup, in eval mode, on the device.
    layers_ : dict of str to int
        Row of ``coef_`` for every tensor.
    ingredients_ : tuple of str
        All names.
    layer_names_ : tuple of str
        Names of the rows.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
    checkpoints_ : CheckpointCollection
        What was mixed.
    recipe_ : Recipe
        The record that `save` writes.
    warnings_ : tuple of str
        What fitting warned of.
    recalibrated_ : tuple of str
        BatchNorm's tensors that were re-estimated from the held-out rows.
    counts_ : Counts
        Passes and rows, forward and backward, that the fit took.

    See Also
    --------
    GreedySoup : Leaves out what does not help.

    Notes
    -----
    Cost: one read of the checkpoints. Memory: two models.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Table 2.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, UniformSoup
    >>> nets = [torch.nn.Linear(2, 2) for _ in range(4)]
    >>> soup = UniformSoup().fit(CheckpointCollection(nets), torch.eye(2), torch.tensor([0, 1]))
    >>> soup.coef_.tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    checkpoints: Any = None
    _: KW_ONLY
    batch_norm: BatchNormPolicy = "average"
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    batch_size: int | None = 128
    device: str | torch.device = "auto"
    shard: str | None = None

    def _search(self, problem: Problem) -> Found:
        with problem.progress("average", 0):
            n = len(problem.checkpoints)
            return Found(np.full((1, n), 1 / n))


@dataclass(eq=False, repr=False)
class BestCheckpoint(BaseSoup):
    """Keep the checkpoint with the highest held-out score: the usual practice, as a baseline.

    Its coefficients are 1 for that checkpoint and 0 for all others.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to choose from; may be given to `fit` instead.
    scoring : str, callable or None, default=None
        What the search maximises, such as ``"f1_macro"``: a scorer of scikit-learn, greater is
        better; by default accuracy or R², by ``task``, which is what ``score`` returns always.
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
        Checkpoints evaluated side by side, by joblib; the scores are the same for any number.
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.
    memory : str, path-like, joblib.Memory or None, default=None
        Where scores are kept, so that a fit that was killed goes on where it was.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1 for the best, the first on ties; 0 elsewhere.
    individual_scores_ : dict of str to float
        Held-out score of each checkpoint.
    ingredients_ : tuple of str
        Name of the one kept.
    module_ : nn.Module
        That checkpoint, in eval mode, on the device.
    layers_ : dict of str to int
        Row of ``coef_`` for every tensor.
    layer_names_ : tuple of str
        Names of the rows.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
    checkpoints_ : CheckpointCollection
        What was chosen from.
    recipe_ : Recipe
        The record that `save` writes.
    warnings_ : tuple of str
        What fitting warned of.

    Notes
    -----
    Cost: K evaluations of N rows, none when the collection has ``scores``. Memory: two
    models; with workers, two for each.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Section 1.

    Examples
    --------
    >>> import torch
    >>> from sksoup import BestCheckpoint, CheckpointCollection
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
    >>> for net, scale in zip(nets, [-1.0, 2.0]):
    ...     _ = net.weight.data.copy_(scale * torch.eye(2))
    >>> best = BestCheckpoint(CheckpointCollection(nets)).fit(torch.eye(2), torch.tensor([0, 1]))
    >>> best.ingredients_, best.individual_scores_
    (('checkpoint1',), {'checkpoint0': 0.0, 'checkpoint1': 1.0})
    """

    checkpoints: Any = None
    _: KW_ONLY
    scoring: Any = None
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    batch_size: int | None = 128
    n_jobs: int | None = None
    device: str | torch.device = "auto"
    memory: Any = None

    def _search(self, problem: Problem) -> Found:
        checkpoints = problem.checkpoints
        checkpoints.check()
        n = 0 if checkpoints.scores else len(checkpoints)
        self._log_steps(problem, evaluations=n)
        with problem.progress("evaluation", n) as step:
            scores = rank_checkpoints(problem, step, n_jobs=self.n_jobs).scores
        if checkpoints.scores is None:
            self._warn_of_chance(scores, problem.evaluate)
        best = max(checkpoints.names, key=scores.__getitem__)  # the first on ties
        coef = np.array([[float(name == best) for name in checkpoints]])
        return Found(coef, attributes={"individual_scores_": scores, "ingredients_": (best,)})


@dataclass(eq=False, repr=False)
class CheckpointEnsemble(BaseSoup):
    r"""Average the logits of all checkpoints: K times the inference cost of a soup.

    Predicts from :math:`\frac{1}{K} \sum_k f(x; w_k)`. Not a soup: it has no ``module_`` and no
    ``state_dict``, and every prediction reads all checkpoints. The papers' upper baseline.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to average; may be given to `fit` instead.
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
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/K each: the weights of the logits.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
    checkpoints_ : CheckpointCollection
        What is averaged.

    Notes
    -----
    Cost of a prediction: K reads and K forward passes. Memory: one model at a time; the rows of
    a loader are kept, since every checkpoint needs them, as far as memory holds them.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Table 2.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, CheckpointEnsemble
    >>> nets = [torch.nn.Linear(2, 2) for _ in range(4)]
    >>> ensemble = CheckpointEnsemble(CheckpointCollection(nets))
    >>> ensemble.fit(torch.eye(2), torch.tensor([0, 1])).predict_proba(torch.eye(2)).shape
    (2, 2)
    """

    checkpoints: Any = None
    _: KW_ONLY
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    batch_size: int | None = 128
    device: str | torch.device = "auto"

    _has_recipe = False

    def _search(self, problem: Problem) -> Found:
        problem.checkpoints.check()
        with problem.progress("check", 0):
            n = len(problem.checkpoints)
            return Found(np.full((1, n), 1 / n))

    def _rows_at_once(self) -> int | None:
        """All, so that each checkpoint is read once."""
        return None

    def _outputs_of(self, X: Any) -> torch.Tensor:
        return self._network()[1](X)

    def _network(self) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
        """A module, and the mean logits of some rows: each time all checkpoints are read."""
        checkpoints: CheckpointCollection = self.checkpoints_
        module = prepare_module(
            checkpoints.build_module(), checkpoints, resolve_device(self.device)
        )

        def mean_logits(X: Any) -> torch.Tensor:
            total: torch.Tensor | None = None
            for name in checkpoints:
                load_weights(module, checkpoints[name])
                logits = self._module_outputs(module, X)
                total = logits if total is None else total.add_(logits)
            if total is None:  # pragma: no cover - a collection is never empty
                raise RuntimeError("no checkpoints")
            return total / len(checkpoints)

        return module, mean_logits

    @property
    def state_dict(self) -> Any:
        """Not available: an ensemble has no weights of its own."""
        raise AttributeError(
            "An ensemble averages logits, not weights, so it has no state_dict and can't be saved "
            "as one model. Fit a UniformSoup for the mean of the weights."
        )

    save = save_pretrained = save_adapter = report = to_skorch = state_dict
