"""Learned-Soup: coefficients on the simplex, by gradient descent [W22, Appendix I]."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..data.outputs import Task
from ..engine.batch_norm import BatchNormPolicy
from ..engine.center import Anchor
from ..engine.descent import (
    Descent,
    OpenDeltas,
    coefficient_dtype,
    private_generator,
    within_memory,
)
from ..engine.objective import Criterion, Forward
from ..engine.problem import Found, Problem
from ..exceptions import DivergenceError
from ..mixing.layers import Layerwise
from ..runtime.cache import Cache
from .base import BaseSoup
from .center import center_instead, check_center, choose_center
from .progress import one_attempt
from .validation import (
    check_descent,
    check_flag,
    check_minibatches,
    search_cache,
    settings_of,
    storage_for,
    warn_of_lr,
)

__all__ = ["LearnedSoup"]


@dataclass(eq=False, repr=False)
class LearnedSoup(BaseSoup):
    r"""Learn coefficients on the simplex, and a temperature, on held-out data.

    Gradient descent on :math:`p = \mathrm{softmax}(a)`, from :math:`p_k = 1/K`, for the loss of
    :math:`\beta f(x; g + \sum_k p_k s_k (w_k - g))`, with :math:`g = \sum_k q_k w_k` a good point
    (the center) and :math:`s_k \le 1` a bound for long deltas; one softmax per layer with
    ``layerwise`` (Learned-Soup+). The coefficients :math:`c_k = s_k p_k + (1 - \sum_j s_j p_j) q_k`
    stay on the simplex. The soup, its center and the best checkpoint are compared on all held-out
    rows, and the best of them is the result.

    ``LearnedSoup(center="mean", clip_deltas=None)`` is the paper's: :math:`c` is the softmax, and
    nothing is compared.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    layerwise : bool or callable, default=False
        True gives every parameter tensor its own coefficients; a callable maps a parameter's name
        to the label of its layer.
    center : {"top", "best", "greedy", "mean"} or array-like, default="top"
        Coefficients :math:`q`, shape (n_checkpoints,), of the point that the search begins at and
        that deltas are taken from: the mean of the quarter of the checkpoints that rank best, or
        the best one, by a ranking on ``ranking_rows`` (none where the collection has ``scores``);
        the `GreedySoup`; the mean of all, as in the paper; or as given, with sum 1. "top" leaves
        out checkpoints that are unrelated to the others (`CheckpointCollection.strangers`).
    ranking_rows : int or None, default=128
        Held-out rows, drawn at random and stratified by label, that rank the checkpoints for
        ``center="top"`` or ``"best"``; None, or more than there are, for all.
    clip_deltas : {"median"} or None, default="median"
        "median" multiplies a delta that is longer than is usual in a layer so that it is as long as
        the median, in the search and in the coefficients: a failed run can move the soup no further
        than the others do. None leaves deltas as they are, as in the paper.
    temperature : bool, default=True
        Also learn a factor :math:`\beta` on the logits; regressions have none.
    memory_limit : int, str or None, default=None
        Bytes, or a string such as "8GB", for K + 2 models (K + 1 on a GPU); None is half of
        what the device has free. Where they do not fit, the models are read from their files at
        each step. Held-out rows that are read by index (docs: Models and data larger than memory)
        are kept within as many bytes again.
    delta_dtype : {"float32", "bfloat16"}, torch.dtype or None, default=None
        What the K deltas are held in; None is the dtype of the module. bfloat16 halves their
        memory.
    shard : {None, "auto"}, default=None
        "auto" spreads the module, its gradient and the deltas over the ranks of a distributed job
        with PyTorch's FSDP2, block by block, for models that no device holds (docs: Several
        devices). None lets every rank hold the module, unless it was wrapped already.
    lr : float, default=0.05
        Learning rate for :math:`a` and :math:`\beta`.
    max_epochs : int, default=5
        Passes over the held-out rows.
    batch_size : int or None, default=128
        Rows per forward and backward pass; None for all at once.
    accumulate : int, default=1
        Minibatches per step, as if they were one.
    precision : {"fp32", "bf16"}, default="fp32"
        "bf16" runs the forward pass of the search under autocast; the soup stays as it is.
        A processor without instructions for it is slower, which is measured first and warned of.
    compile : bool, default=False
        Whether to run the search through ``torch.compile``.
    optimizer : {"adamw", "sgd"}, default="adamw"
        Without weight decay.
    schedule : {"cosine", "constant"}, default="constant"
        Cosine warms up over the first fifth of the steps.
    shuffle : bool, default=True
        Visit the rows in a new random order each epoch.
    criterion : class, nn.Module, callable or None, default=None
        Loss ``(output, y) -> scalar or one per row``; by default cross-entropy, squared error or
        binary cross-entropy with logits, by ``task``.
    batch_norm : {"average", "recalibrate", "auto"}, default="average"
        Running statistics of BatchNorm: mixed like the weights around them; or re-estimated from
        the held-out rows (for the result; the search normalises by the minibatch); or whichever
        scores better on them, mixed on ties.
    forward : callable or None, default=None
        ``(module, X) -> outputs``, by default ``module(X)``, ``**X`` of a dict, ``*X`` of a tuple.
    task : str, default="classification"
        What the outputs mean: "classification", "regression", "multilabel", or "language-modeling"
        (docs: Language models).
    classes : array-like of shape (n_outputs,) or None, default=None
        Labels in output order; by default the names in the module's config (``id2label`` of
        transformers) where ``y`` is texts and it has names, else those of ``y`` sorted, if one per
        output, else 0, 1, ....
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.
    random_state : int, RandomState or None, default=None
        Seeds the order of the rows; never the global state.
    memory : str, path-like, joblib.Memory or None, default=None
        Where epochs are kept, so that a fit that was killed goes on where it was.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        Coefficients in [0, 1]; rows sum to 1.
    center_ : ndarray of shape (n_checkpoints,), float64
        Coefficients :math:`q` of the center.
    held_out_scores_ : dict of str to float
        Task's score on all held-out rows of what was searched for ("soup"), of its "center", and of
        the "best" ranked checkpoint; not with ``center="mean"``, where nothing is compared.
    temperature_ : float
        :math:`\beta`: multiplies the logits in `predict_proba`, never folded into the weights.
    module_ : nn.Module
        The soup, in eval mode, on the device; gives raw logits.
    layers_ : dict of str to int
        Row of ``coef_`` for every tensor.
    ingredients_ : tuple of str
        Names of the checkpoints with a coefficient other than 0.
    layer_names_ : tuple of str
        Names of the rows.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
    checkpoints_ : CheckpointCollection
        What was mixed.
    history_ : list of dict
        One per epoch: ``epoch``; ``loss``, ``grad_norm`` and, but for regressions, ``score`` (of
        the minibatch) at every step.
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
    DivergenceError
        With ``center="mean"``, the loss or the coefficients stopped being finite.
    ValueError
        ``center`` has another number of coefficients than there are checkpoints, or negative ones.

    Warns
    -----
    SoupWarning
        The memory does not hold K models: each step reads all files twice, which is slow. Or the
        loss stopped being finite, or what was found scores lower on the held-out rows than its
        center or the best checkpoint, which is the soup instead.

    See Also
    --------
    MEHLSoup : The same without the simplex, in bounded memory.

    Notes
    -----
    No graph over K models is built: :math:`\partial L / \partial p_k = \langle \nabla_w L, s_k (w_k
    - g) \rangle` up to a constant that the softmax cancels. Cost: a forward and a backward pass
    per step, as for `MEHLSoup` those of ranking and comparing, and the same reads with one pass
    over the checkpoints. Memory: K + 2 models beside the module, its gradient and its activations,
    K/2 + 2 with bfloat16 deltas; on a GPU one less, as the center is in host memory. Dropout is off
    and BatchNorm uses its mixed statistics, which carry no gradient. The bound is that of
    `MEHLSoup`.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Appendix I.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, LearnedSoup
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
    >>> for net, scale in zip(nets, [-1.0, 2.0]):
    ...     _ = net.weight.data.copy_(scale * torch.eye(2))
    >>> soup = LearnedSoup(CheckpointCollection(nets), max_epochs=50, random_state=0)
    >>> soup.fit(torch.eye(2), torch.tensor([0, 1])).coef_.argmax()
    np.int64(1)
    """

    checkpoints: Any = None
    _: KW_ONLY
    layerwise: Layerwise = False
    center: str | ArrayLike = "top"
    ranking_rows: int | None = 128
    clip_deltas: str | None = "median"
    temperature: bool = True
    memory_limit: int | str | None = None
    delta_dtype: str | torch.dtype | None = None
    shard: str | None = None
    lr: float = 0.05
    max_epochs: int = 5
    batch_size: int | None = 128
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    optimizer: str = "adamw"
    schedule: str = "constant"
    shuffle: bool = True
    criterion: Criterion | None = None
    batch_norm: BatchNormPolicy = "average"
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    device: str | torch.device = "auto"
    random_state: Any = None
    memory: Any = None

    weight_decay = 0.0
    model_epochs = 1

    def _check_params(self) -> None:
        super()._check_params()
        check_descent(self)
        check_center(self)
        check_flag(self.temperature, "temperature")
        if not isinstance(self.center, str) and np.min(self.center) < 0:
            raise ValueError(
                f"center must not have negative coefficients, which no softmax gives, got "
                f"{self.center!r}. MEHLSoup takes them."
            )

    def _search(self, problem: Problem) -> Found:
        """Descend on a (K, n_searched) with c = softmax(a) [W22, Appendix I]."""
        warn_of_lr(self)
        check_minibatches(self, problem)
        cache = search_cache(self, problem, bool(self.temperature))
        generator = private_generator(self.random_state, cache)
        seed = generator.get_state()
        chosen = choose_center(self, problem, generator)
        anchor, names = chosen.anchor, problem.checkpoints.names
        cache = None if cache is None else cache.within(seed, anchor.weights, anchor.clips)
        descent = Descent(problem, settings_of(self, problem), generator)

        def search(n_models: int, open_deltas: OpenDeltas, factors: NDArray[np.float64]) -> Found:
            self._warn_of_strangers(problem.checkpoints, names)
            if n_models < len(names):
                self._warn(
                    f"The memory holds {n_models} of {len(names)} models: each step reads all "
                    f"files twice, which is slow. Raise memory_limit, halve the deltas with "
                    f"delta_dtype='bfloat16', or take MEHLSoup, which needs few at a time."
                )
            generator.set_state(seed)
            kept = None if cache is None else cache.within(n_models)
            try:
                return self._descend(open_deltas, descent, anchor, factors, kept, chosen.attributes)
            except DivergenceError as error:
                attributes = {"temperature_": 1.0, **chosen.attributes}
                return center_instead(self, chosen, problem, error, attributes)

        found = within_memory(problem, anchor, search, storage_for(self, problem), "auto", cache)
        if found is None:  # all checkpoints are equal
            attributes = {"temperature_": 1.0, **chosen.attributes}
            found = Found(chosen.coef(problem), attributes=attributes)
        return chosen.checked(found, problem)

    @one_attempt
    def _descend(
        self,
        open_deltas: OpenDeltas,
        descent: Descent,
        anchor: Anchor,
        factors: NDArray[np.float64],
        cache: Cache | None,
        attributes: dict[str, Any],
    ) -> Found:
        problem = descent.problem
        names, device = problem.checkpoints.names, problem.data.y.device
        dtype = coefficient_dtype(device)
        a = torch.zeros(factors.shape, dtype=dtype, device=device).requires_grad_()
        s = torch.as_tensor(factors, dtype=dtype, device=device)
        self._log_steps(problem, **descent.n_steps)
        learns = bool(self.temperature) and self.task in ("classification", "multilabel")
        beta = torch.ones((), dtype=dtype, device=device).requires_grad_(learns)
        with open_deltas([names]) as deltas, problem.progress("epoch", self.max_epochs) as step:
            deltas.load(names)
            history = descent.run(
                deltas,
                lambda: a.softmax(dim=0) * s,
                [a, beta] if learns else [a],
                soup_coef=lambda shortened: anchor.affine_coef(shortened.T),
                step=step,
                cache=cache,
                scale=beta if learns else None,
            )
        coef = a.detach().softmax(dim=0).T.cpu().double().numpy()  # (n_searched, K)
        coef = coef / coef.sum(axis=1, keepdims=True)
        clipped = coef * factors.T  # the rest goes to the center: 0 where nothing is clipped
        rest = (coef * (1 - factors.T)).sum(axis=1, keepdims=True)
        attributes = {"temperature_": float(beta.detach()), **attributes}
        return Found(clipped + rest * anchor.q, history, attributes)
