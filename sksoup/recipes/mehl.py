"""MEHL-Soup: block coordinate descent in the hyperplane of the checkpoints [L24, Algorithm 1]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_scalar

from ..data.outputs import Task
from ..data.rows import HeldOut
from ..data.split import split_rows
from ..engine.batch_norm import BatchNormPolicy
from ..engine.center import Anchor
from ..engine.deltas import Deltas
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
    check_fraction,
    check_minibatches,
    search_cache,
    settings_of,
    storage_for,
    warn_of_lr,
)

__all__ = ["MEHLSoup"]


def draw_model_batches(
    n: int, b: int, model_epochs: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Split a new random order of the n checkpoints into batches of b, model_epochs times."""
    for _ in range(model_epochs):
        order = torch.randperm(n, generator=generator).tolist()
        yield from (order[start : start + b] for start in range(0, n, b))


class Displacement:
    """How far alpha_B has moved since the start of an outer iteration: (b, n_searched).

    A function of v, with alpha_B = s v, or s v / |delta| if ``norms`` are given.
    """

    def __init__(
        self,
        start: NDArray[np.float64],
        factors: NDArray[np.float64],
        norms: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        dtype = coefficient_dtype(device)
        self.start = torch.as_tensor(start, dtype=dtype, device=device)
        self.unit = torch.as_tensor(factors, dtype=dtype, device=device)
        if norms is not None:
            self.unit = self.unit * norms.to(self.start).reciprocal()
        self.v = (self.start / self.unit).requires_grad_()

    def __call__(self) -> torch.Tensor:
        return self.v * self.unit - self.start


def coef_after(
    anchor: Anchor,
    alpha: NDArray[np.float64],
    batch: Sequence[int],
    moved: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Coefficients of the soup once alpha_B has moved."""
    after = alpha.copy()
    after[batch] += moved
    return anchor.affine_coef(after.T)


@dataclass(eq=False, repr=False)
class MEHLSoup(BaseSoup):
    r"""Learn coefficients in the hyperplane of the checkpoints, a few checkpoints at a time.

    Minimizes the held-out loss of :math:`g + \sum_k \alpha_k s_k (w_k - g)` from :math:`\alpha =
    0`, where :math:`g = \sum_k q_k w_k`, the center, is a good starting point and :math:`s_k \le 1`
    shortens long deltas. :math:`\alpha` is unconstrained, so coefficients may be negative or exceed
    1, but they sum to 1: :math:`c_k = s_k \alpha_k + (1 - \sum_j s_j \alpha_j) q_k`. Each outer
    iteration loads ``model_batch_size`` checkpoints and runs minibatch gradient steps on their
    :math:`\alpha` only (block coordinate descent). With ``layerwise`` every layer has its own
    coefficients (MEHL-Soup+); ``model_batch_size=None`` loads all checkpoints at once (HL-Soup).
    Finally the soup, its center and the best checkpoint are compared on all held-out rows, and the
    one with the highest score is the result.

    ``MEHLSoup(center="mean", clip_deltas=None, weight_decay=0)`` is the algorithm of the paper:
    :math:`q_k = 1/K`, :math:`s_k = 1`, and no comparison at the end.

    Its parameters by purpose:

    - *essential*: ``checkpoints``, ``layerwise``, ``task``, ``classes``, ``max_epochs``,
      ``random_state``;
    - *memory*: ``model_batch_size``, ``memory_limit``, ``delta_dtype``, ``batch_size``,
      ``accumulate``, ``prefetch``, ``shard``;
    - *optimizer*: ``lr``, ``optimizer``, ``weight_decay``, ``schedule``, ``model_epochs``,
      ``shuffle``;
    - *advanced*: ``center``, ``ranking_rows``, ``clip_deltas``, ``normalize``,
      ``validation_fraction``, ``criterion``, ``forward``, ``batch_norm``, ``precision``,
      ``compile``, ``device``, ``memory``.

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
    model_batch_size : int, None or "auto", default="auto"
        Number of checkpoints in memory at a time (b). None loads all; "auto" loads as many as fit
        into ``memory_limit``.
    memory_limit : int, str or None, default=None
        Memory for b + 2 models (b + 1 on a GPU) and those that are read ahead, in bytes or as a
        string such as "8GB". It determines ``model_batch_size="auto"``; an explicit model batch
        that does not fit raises an error. None is half of the device's free memory, for "auto"
        only. Held-out rows that are read by index (docs: Models and data larger than memory) are
        kept in memory up to the same number of bytes.
    delta_dtype : {"float32", "bfloat16"}, torch.dtype or None, default=None
        Dtype in which the b deltas are stored. None is the dtype of the module. bfloat16 halves
        their memory; sums are still computed in the module's dtype.
    shard : {None, "auto"}, default=None
        "auto" shards the module, its gradient and the deltas across the ranks of a distributed job
        with PyTorch's FSDP2, block by block, for models that do not fit on one device (see the page
        "Several devices"). With None every rank holds the whole module, unless it is already
        wrapped.
    prefetch : int, default=1
        Number of models that a background thread reads in advance, each into its own memory (pinned
        host memory for CUDA). Meanwhile the operating system reads the files of the next model
        batch into its cache. With 0 every file is read when it is needed.
    lr : float, default=0.05
        Learning rate for :math:`\alpha`, in units of coefficients.
    max_epochs : int, default=5
        Number of passes over the held-out rows per model batch (inner iterations).
    model_epochs : int, default=1
        Number of passes over the checkpoints.
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
        Its state is reset for each model batch.
    weight_decay : float or "auto", default="auto"
        Weight decay of the optimizer on :math:`\alpha`, which pulls the soup towards the center.
        "auto" is 1000 / N for N held-out rows, but at most 1 / ``lr``: relative to the mean loss of
        N rows, a prior on :math:`\alpha` has a weight proportional to 1 / N.
    schedule : {"cosine", "constant"}, default="cosine"
        Learning rate schedule of each model batch. "cosine" warms up over the first fifth of the
        steps.
    normalize : bool, default=False
        Whether to scale every delta to unit length per layer during the search, as the authors'
        code does (with ``lr=0.01``). The coefficients found refer to the unscaled deltas.
    validation_fraction : float or None, default=None
        Fraction of the rows, drawn at random and stratified by label, that is excluded from the
        gradients and used to select, for each model batch, the epoch (or the starting point) with
        the lowest loss.
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
        Seed for the order of checkpoints and rows. The global random state is neither used nor
        changed.
    memory : str, path-like, joblib.Memory or None, default=None
        Folder or cache where epochs are stored, so that an interrupted fit resumes where it
        stopped.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        Coefficients; rows sum to 1.
    center_ : ndarray of shape (n_checkpoints,), float64
        Coefficients :math:`q` of the center.
    held_out_scores_ : dict of str to float
        Scores on all held-out rows of the search's result ("soup"), of its "center" and of the
        highest-ranked checkpoint ("best"). Not set with ``center="mean"``, where nothing is
        compared.
    model_batch_size_ : int
        The value of b that was used, after any halving for lack of memory.
    module_ : nn.Module
        The soup, in eval mode, on the device.
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
        One record per inner epoch: ``outer`` (iteration), ``models`` (names), ``epoch``; ``loss``,
        ``grad_norm`` and, except in regression, ``score`` of the minibatch at every step;
        ``validation_loss`` at the end of the epoch, with ``validation_fraction``.
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
        With ``center="mean"``, the loss or the coefficients became NaN or infinite. The attribute
        ``coef`` of the error holds the coefficients before that epoch.
    ValueError
        The requested model batch does not fit into ``memory_limit``; or ``center`` does not have
        one coefficient per checkpoint.

    Warns
    -----
    SoupWarning
        Memory ran out, and the search starts again with half the model batch; the result is the
        same as with that size from the beginning. Or the loss became NaN or infinite, or the result
        scores lower on the held-out rows than its center or the best checkpoint, which then becomes
        the soup. Or extrapolation made a running variance of BatchNorm negative; it is set to 0.

    See Also
    --------
    LearnedSoup : Coefficients on the simplex.
    GreedySoup : No gradients needed.

    Notes
    -----
    The gradient needs no graph over K models: :math:`\partial L / \partial \alpha_k = \langle
    \nabla_w L(w), s_k (w_k - g) \rangle` (Eq. 6): each step needs one forward and backward pass of
    one model, and inner products. With D parameters, N held-out rows and ``batch_size`` n there are
    ``ceil(K / b) * max_epochs * ceil(N / n)`` steps per pass over the checkpoints; the ranking
    takes ``K * ranking_rows`` forward rows, and the comparison 3 N. All files are read once to be
    checked and once to be ranked (neither with ``center="mean"``), once for the lengths of their
    deltas (not with the paper's settings), once per pass over the checkpoints, and once for the
    final `mix`; those in the center are read once more. Memory in addition to the module, its
    gradient and its activations: b + 2 models (the deltas, the center, the soup), or b/2 + 2 with
    bfloat16 deltas, and ``prefetch`` more models. On a GPU it is one model less, because the center
    and the models that are read ahead are in host memory. The page "Cost" gives a lower bound.
    Dropout is disabled, and BatchNorm uses its mixed statistics, which carry no gradient.

    The factor is :math:`s_{kl} = \min(1, \mathrm{median}_j \lVert \delta_{jl} \rVert / \lVert
    \delta_{kl} \rVert)` with :math:`\delta_k = w_k - g`, where the median is over the nonzero
    lengths. The length of a layer covers all tensors that its coefficients mix, including the
    statistics of BatchNorm. With ``validation_fraction`` the rows set aside are not used to choose
    the center.

    References
    ----------
    Li et al., *Learning Scalable Model Soup on a Single GPU*, ECCV 2024, arXiv:2407.03641,
    Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, MEHLSoup
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(4)]
    >>> for net, scale in zip(nets, [-1.0, 0.0, 1.0, 2.0]):
    ...     _ = net.weight.data.copy_(scale * torch.eye(2))
    >>> soup = MEHLSoup(CheckpointCollection(nets), model_batch_size=2, random_state=0)
    >>> soup = soup.fit(torch.eye(2), torch.tensor([0, 1]))
    >>> soup.coef_.shape, round(float(soup.coef_.sum()), 6), soup.score(torch.eye(2), [0, 1])
    ((4,), 1.0, 1.0)
    """

    checkpoints: Any = None
    _: KW_ONLY
    layerwise: Layerwise = False
    center: str | ArrayLike = "top"
    ranking_rows: int | None = 128
    clip_deltas: str | None = "median"
    model_batch_size: int | str | None = "auto"
    memory_limit: int | str | None = None
    delta_dtype: str | torch.dtype | None = None
    shard: str | None = None
    prefetch: int = 1
    lr: float = 0.05
    max_epochs: int = 5
    model_epochs: int = 1
    batch_size: int | None = 128
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    optimizer: str = "adamw"
    weight_decay: float | str = "auto"
    schedule: str = "cosine"
    normalize: bool = False
    validation_fraction: float | None = None
    shuffle: bool = True
    criterion: Criterion | None = None
    batch_norm: BatchNormPolicy = "average"
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    device: str | torch.device = "auto"
    random_state: Any = None
    memory: Any = None

    def _check_params(self) -> None:
        super()._check_params()
        check_descent(self)
        b = self.model_batch_size
        is_count = isinstance(b, Integral) and not isinstance(b, bool) and b >= 1
        if not (b is None or b == "auto" or is_count):
            raise ValueError(f"model_batch_size must be an int >= 1, None or 'auto', got {b!r}.")
        check_scalar(self.prefetch, "prefetch", Integral, min_val=0)
        check_center(self)
        check_fraction(self.validation_fraction, "validation_fraction")
        check_flag(self.normalize, "normalize")

    def _search(self, problem: Problem) -> Found:
        warn_of_lr(self)
        cache = search_cache(
            self, problem, bool(self.normalize), self.model_epochs, self.validation_fraction
        )
        generator = private_generator(self.random_state, cache)
        seed = generator.get_state()
        aside = None
        if self.validation_fraction is not None:
            problem, aside = self._set_aside(problem, self.validation_fraction, generator)
        check_minibatches(self, problem, aside)
        chosen = choose_center(self, problem, generator)
        anchor, n = chosen.anchor, len(problem.checkpoints)
        cache = None if cache is None else cache.within(seed, anchor.weights, anchor.clips)
        descent = Descent(problem, settings_of(self, problem), generator, aside)

        def search(b: int, open_deltas: OpenDeltas, factors: NDArray[np.float64]) -> Found:
            """Algorithm 1 with model batches of b."""
            attributes = {"model_batch_size_": b, **chosen.attributes}
            try:
                generator.set_state(seed)
                alpha, history = self._block_coordinate_descent(
                    b, open_deltas, descent, anchor, factors, cache
                )
            except DivergenceError as error:
                return center_instead(self, chosen, problem, error, attributes)
            return Found(anchor.affine_coef(alpha.T), history, attributes)

        found = within_memory(
            problem, anchor, search, storage_for(self, problem, self.prefetch),
            self.model_batch_size, cache, self._warn_of_halving,
        )  # fmt: skip
        if found is None:  # all checkpoints are equal
            found = Found(
                chosen.coef(problem), attributes={"model_batch_size_": n, **chosen.attributes}
            )
        return chosen.checked(found, problem)

    @one_attempt
    def _block_coordinate_descent(
        self,
        b: int,
        open_deltas: OpenDeltas,
        descent: Descent,
        anchor: Anchor,
        factors: NDArray[np.float64],
        cache: Cache | None,
    ) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Algorithm 1 of [L24]; s alpha (K, n_searched) persists between model batches B of b."""
        checkpoints, device = descent.problem.checkpoints, descent.problem.data.y.device
        names = np.array(checkpoints.names, dtype=object)
        alpha, history = np.zeros_like(factors), list[dict[str, Any]]()
        self._warn_of_strangers(checkpoints, checkpoints.names)
        batches = list(draw_model_batches(len(names), b, self.model_epochs, descent.generator))
        self._log_steps(descent.problem, model_batches=len(batches), **descent.n_steps)
        with (
            open_deltas([names[batch].tolist() for batch in batches]) as deltas,
            descent.problem.progress("epoch", len(batches) * self.max_epochs) as step,
        ):
            for outer, batch in enumerate(batches):  # outer iterations
                deltas.load(names[batch])  # w_k - g for k in B; in the paper g is w-bar
                kept = None if cache is None else cache.within(b, outer)
                norms = self._norms(deltas, kept)
                moved = Displacement(alpha[batch], factors[batch], norms, device)
                records = descent.run(  # inner iterations on alpha_B: Eq. 6 and AdamW
                    deltas, moved, [moved.v], step=step, cache=kept,
                    soup_coef=partial(coef_after, anchor, alpha, batch),
                    where=f"outer iteration {outer + 1} of {len(batches)}, ",
                )  # fmt: skip
                deltas.commit(moved().detach())  # w <- w + sum_{k in B} moved_k delta_k: Eq. 8
                alpha[batch] += moved().detach().cpu().double().numpy()
                models = {"outer": outer, "models": tuple(names[batch])}
                history += [{**models, **record} for record in records]
        return alpha, history

    def _norms(self, deltas: Deltas, cache: Cache | None) -> torch.Tensor | None:
        """|delta| of each layer, (b, n_searched), if ``normalize`` is set."""
        if not self.normalize:
            return None
        return deltas.norms() if cache is None else cache(("norms",), lambda: deltas.norms())

    def _set_aside(
        self, problem: Problem, fraction: float, generator: torch.Generator
    ) -> tuple[Problem, HeldOut]:
        """Set rows aside to select the best epoch on."""
        seed = int(torch.randint(2**31, (), generator=generator))
        y, data = problem.evaluate.y, problem.data
        aside, rest = split_rows(y, self.task, data.amounts, fraction, seed)
        evaluate = problem.evaluate.on(rest.numpy())
        return replace(problem, data=data.select(rest), evaluate=evaluate), data.select(aside)

    def _warn_of_halving(self, b: int) -> None:
        self._warn(
            f"Memory ran out: starting again with model_batch_size={b}. To avoid the failed "
            f"attempt, pass this value or a memory_limit; delta_dtype='bfloat16' halves the memory "
            f"of the deltas."
        )
