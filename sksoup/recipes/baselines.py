"""Baselines without a search: uniform soup, best checkpoint, ensemble of logits."""

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

    :math:`w = \frac{1}{K} \sum_k w_k`. The held-out data only determines the labels.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        Checkpoints to mix. They can also be passed to `fit`.
    batch_norm : {"average", "recalibrate", "auto"}, default="average"
        How the running statistics of BatchNorm are obtained. "average" mixes them with the
        coefficients of the weights around them; "recalibrate" re-estimates them from the held-out
        rows (for the result); "auto" takes whichever of the two scores higher on these rows, and
        "average" if they are equal.
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
    device : str or torch.device, default="auto"
        Device that the module runs on. "auto" is "cuda" if available, else "mps", else "cpu".
    shard : {None, "auto"}, default=None
        "auto" shards the module across the ranks of a distributed job with PyTorch's FSDP2, block
        by block, for models that do not fit on one device (see the page "Several devices"). With
        None every rank holds the whole module, unless it is already wrapped.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/K for each checkpoint.
    module_ : nn.Module
        The soup, in eval mode, on the device.
    layers_ : dict of str to int
        For every tensor name, the index of its row in a two-dimensional ``coef_``.
    ingredients_ : tuple of str
        Names of all checkpoints.
    layer_names_ : tuple of str
        Names of the layers: the rows of a two-dimensional ``coef_``.
    classes_ : ndarray of shape (n_outputs,)
        Sorted labels (classification only), in the order of the columns of `predict_proba`;
        ``recipe_.classes`` has the order of the outputs. For multi-label, a list of arrays [0, 1].
    checkpoints_ : CheckpointCollection
        The checkpoints that were mixed.
    recipe_ : Recipe
        Record of the soup, which `save` writes.
    warnings_ : tuple of str
        Messages of the warnings that `fit` issued.
    recalibrated_ : tuple of str
        Names of the BatchNorm tensors that were re-estimated from the held-out rows.
    counts_ : Counts
        Numbers of forward and backward passes, and of rows in them, during `fit`.

    See Also
    --------
    GreedySoup : Leave out the checkpoints that do not help.

    Notes
    -----
    Cost: each checkpoint is read once. Memory: two models.

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
    """Select the checkpoint with the highest held-out score: the usual practice, as a baseline.

    Its coefficients are 1 for that checkpoint and 0 for all others.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        Checkpoints to choose from. They can also be passed to `fit`.
    scoring : str, callable or None, default=None
        The metric to maximize: a scikit-learn scorer such as ``"f1_macro"`` (greater is better). By
        default accuracy or R², depending on ``task``, which `score` returns whatever ``scoring``
        is.
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
        Number of joblib workers that evaluate checkpoints in parallel. The scores do not depend on
        it.
    device : str or torch.device, default="auto"
        Device that the module runs on. "auto" is "cuda" if available, else "mps", else "cpu".
    memory : str, path-like, joblib.Memory or None, default=None
        Folder or cache where scores are stored, so that an interrupted fit resumes where it
        stopped.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1 for the best checkpoint (the first one if there are ties), 0 for the others.
    individual_scores_ : dict of str to float
        Held-out score of each checkpoint.
    ingredients_ : tuple of str
        Name of the selected checkpoint.
    module_ : nn.Module
        The selected checkpoint, in eval mode, on the device.
    layers_ : dict of str to int
        For every tensor name, the index of its row in a two-dimensional ``coef_``.
    layer_names_ : tuple of str
        Names of the layers: the rows of a two-dimensional ``coef_``.
    classes_ : ndarray of shape (n_outputs,)
        Sorted labels (classification only), in the order of the columns of `predict_proba`;
        ``recipe_.classes`` has the order of the outputs. For multi-label, a list of arrays [0, 1].
    checkpoints_ : CheckpointCollection
        The checkpoints that were compared.
    recipe_ : Recipe
        Record of the soup, which `save` writes.
    warnings_ : tuple of str
        Messages of the warnings that `fit` issued.

    Notes
    -----
    Cost: K evaluations of N rows, or none if the collection has ``scores``. Memory: two models, or
    two for each worker.

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

    Predicts from :math:`\frac{1}{K} \sum_k f(x; w_k)`. An ensemble is not a soup: it has no
    ``module_`` and no ``state_dict``, and every prediction reads all checkpoints. In the papers it
    serves as the upper baseline.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        Checkpoints whose logits are averaged. They can also be passed to `fit`.
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
    device : str or torch.device, default="auto"
        Device that the module runs on. "auto" is "cuda" if available, else "mps", else "cpu".

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,), float64
        1/K for each checkpoint: the weights of the logits.
    classes_ : ndarray of shape (n_outputs,)
        Sorted labels (classification only), in the order of the columns of `predict_proba`. For
        multi-label, a list of arrays [0, 1].
    checkpoints_ : CheckpointCollection
        The checkpoints whose logits are averaged.

    Notes
    -----
    Cost of a prediction: K reads and K forward passes. Memory: one model at a time. The rows of a
    loader are kept in memory as far as they fit, because every checkpoint needs them.

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
        """All rows, so that each checkpoint is read once."""
        return None

    def _outputs_of(self, X: Any) -> torch.Tensor:
        return self._network()[1](X)

    def _network(self) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
        """A module, and a function that reads all checkpoints and averages their logits."""
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
            "as one model. To average the weights, fit a UniformSoup."
        )

    save = save_pretrained = save_adapter = report = to_skorch = state_dict
