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
    :math:`\beta f(x; g + \sum_k p_k s_k (w_k - g))`, where :math:`g = \sum_k q_k w_k`, the center,
    is a good starting point and :math:`s_k \le 1` shortens long deltas. With ``layerwise`` there is
    one softmax per layer (Learned-Soup+). The coefficients :math:`c_k = s_k p_k + (1 - \sum_j s_j
    p_j) q_k` stay on the simplex. Finally the soup, its center and the best checkpoint are compared
    on all held-out rows, and the one with the highest score is the result.

    ``LearnedSoup(center="mean", clip_deltas=None)`` is the algorithm of the paper: :math:`c` is the
    softmax, and there is no comparison at the end.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        Checkpoints to mix. They can also be passed to `fit`.
    layerwise : bool or callable, default=False
        If True, every parameter tensor has its own coefficients. A callable maps the name of a
        parameter to the label of its layer.
    center : {"top", "best", "greedy", "mean"} or array-like, default="top"
        Point where the search starts and from which deltas are measured. "top" is the mean of the
        best quarter of the checkpoints, without those unrelated to the others
        (`CheckpointCollection.strangers`); "best" is the best checkpoint; "greedy" is the
        `GreedySoup`; "mean" is the mean of all checkpoints, as in the paper. An array of shape
        (n_checkpoints,) gives its coefficients :math:`q`, which sum to 1; a Series may have the
        names as its index. "top" and "best" rank the checkpoints on ``ranking_rows``, or by the
        ``scores`` of the collection if it has them.
    ranking_rows : int or None, default=128
        Number of held-out rows, drawn at random and stratified by label, that are used to rank the
        checkpoints for ``center="top"`` or ``"best"``. None, or more rows than there are, uses all.
    clip_deltas : {"median"} or None, default="median"
        "median" shortens the deltas that are longer than the median of their layer to that median,
        both during the search and in the coefficients, so that a diverged run cannot move the soup
        further than the others. None leaves deltas unchanged, as in the paper.
    temperature : bool, default=True
        Whether to learn a factor :math:`\beta` on the logits as well, of at least 0.01. Regression
        has none.
    memory_limit : int, str or None, default=None
        Memory for K + 2 models (K + 1 on a GPU), in bytes or as a string such as "8GB". None is
        half of the device's free memory. If the models do not fit, they are read from their files
        at each step. Held-out rows that are read by index (docs: Models and data larger than
        memory) are kept in memory up to the same number of bytes.
    delta_dtype : {"float32", "bfloat16"}, torch.dtype or None, default=None
        Dtype in which the K deltas are stored. None is the dtype of the module. bfloat16 halves
        their memory.
    shard : {None, "auto"}, default=None
        "auto" shards the module, its gradient and the deltas across the ranks of a distributed job
        with PyTorch's FSDP2, block by block, for models that do not fit on one device (see the page
        "Several devices"). With None every rank holds the whole module, unless it is already
        wrapped.
    lr : float, default=0.05
        Learning rate for :math:`a` and :math:`\beta`.
    max_epochs : int, default=5
        Number of passes over the held-out rows.
    batch_size : int or None, default=128
        Number of rows per forward and backward pass. None processes all rows at once.
    accumulate : int, default=1
        Number of minibatches whose gradients are accumulated for one step.
    precision : {"fp32", "bf16"}, default="fp32"
        "bf16" runs the forward pass of the search under autocast; the dtype of the soup does not
        change. A processor without bfloat16 instructions is slower with it; `fit` measures this
        first and warns.
    compile : bool, default=False
        Whether to compile the search with ``torch.compile``.
    optimizer : {"adamw", "sgd"}, default="adamw"
        The optimizer, without weight decay.
    schedule : {"cosine", "constant"}, default="constant"
        Learning rate schedule. "cosine" warms up over the first fifth of the steps.
    shuffle : bool, default=True
        Whether to visit the rows in a new random order in each epoch.
    criterion : class, nn.Module, callable or None, default=None
        Loss ``(output, y)`` that returns a scalar or one value per row. By default cross-entropy,
        squared error or binary cross-entropy with logits, depending on ``task``. For a
        classification it must be a loss of logits, not of probabilities as ``BCELoss``. Labels
        equal to its ``ignore_index`` are left out of the loss and of all scores.
    batch_norm : {"average", "recalibrate", "auto"}, default="average"
        How the running statistics of BatchNorm are obtained. "average" mixes them with the
        coefficients of the weights around them; "recalibrate" re-estimates them from the held-out
        rows (for the result; during the search, each minibatch is normalized by its own
        statistics); "auto" takes whichever of the two scores higher on these rows, and "average" if
        they are equal.
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
    device : str or torch.device, default="auto"
        Device that the module runs on. "auto" is "cuda" if available, else "mps", else "cpu".
    random_state : int, RandomState or None, default=None
        Seed for the order of the rows. The global random state is neither used nor changed.
    memory : str, path-like, joblib.Memory or None, default=None
        Folder or cache where epochs are stored, so that an interrupted fit resumes where it
        stopped.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        Coefficients in [0, 1]; rows sum to 1.
    center_ : ndarray of shape (n_checkpoints,), float64
        Coefficients :math:`q` of the center.
    held_out_scores_ : dict of str to float
        Scores on all held-out rows of the search's result ("soup"), of its "center" and of the
        highest-ranked checkpoint ("best"). Not set with ``center="mean"``, where nothing is
        compared.
    temperature_ : float
        The factor :math:`\beta` on the logits in `predict_proba`. It is not part of the weights.
    module_ : nn.Module
        The soup, in eval mode, on the device. It returns raw logits, without the temperature.
    layers_ : dict of str to int
        For every tensor name, the index of its row in a two-dimensional ``coef_``.
    ingredients_ : tuple of str
        Names of the checkpoints with a coefficient other than 0.
    layer_names_ : tuple of str
        Names of the layers: the rows of a two-dimensional ``coef_``.
    classes_ : ndarray of shape (n_outputs,)
        Sorted labels (classification only), in the order of the columns of `predict_proba`;
        ``recipe_.classes`` has the order of the outputs. For multi-label, a list of arrays [0, 1].
    checkpoints_ : CheckpointCollection
        The checkpoints that were mixed.
    history_ : list of dict
        One record per epoch: ``epoch``; ``loss``, ``grad_norm`` and, except in regression,
        ``score`` of the minibatch at every step.
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
    DivergenceError
        With ``center="mean"``, the loss or the coefficients became NaN or infinite.
    ValueError
        ``center`` does not have one coefficient per checkpoint, or has negative ones.

    Warns
    -----
    SoupWarning
        K models do not fit into memory, so each step reads all files twice, which is slow. Or the
        loss became NaN or infinite, or the result scores lower on the held-out rows than its center
        or the best checkpoint, which then becomes the soup.

    See Also
    --------
    MEHLSoup : The same without the simplex, in bounded memory.

    Notes
    -----
    The gradient needs no graph over K models: :math:`\partial L / \partial p_k = \langle \nabla_w
    L, s_k (w_k - g) \rangle` up to a constant that the softmax cancels. Cost: one forward and one
    backward pass per step; ranking, comparison and reads as for `MEHLSoup` with one pass over the
    checkpoints. Memory: K + 2 models in addition to the module, its gradient and its activations,
    or K/2 + 2 with bfloat16 deltas; one less on a GPU, because the center is in host memory.
    Dropout is disabled, and BatchNorm uses its mixed statistics, which carry no gradient. The
    factors :math:`s_k` are those of `MEHLSoup`.

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
                f"center must not have negative coefficients, because LearnedSoup is restricted to "
                f"the simplex, got {self.center!r}. MEHLSoup accepts them."
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
                    f"Only {n_models} of {len(names)} models fit into memory, so each step reads "
                    f"all files twice, which is slow. Raise memory_limit, halve the memory of the "
                    f"deltas with delta_dtype='bfloat16', or use MEHLSoup, which holds only a few "
                    f"models at a time."
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
        clipped = coef * factors.T  # the rest goes to the center; it is 0 if nothing is clipped
        rest = (coef * (1 - factors.T)).sum(axis=1, keepdims=True)
        attributes = {"temperature_": float(beta.detach()), **attributes}
        return Found(clipped + rest * anchor.q, history, attributes)
