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
    """How far alpha_B has moved from where an outer iteration began: (b, n_searched).

    A function of v, with alpha_B = s v, or s v / |delta| where ``norms`` are given.
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

    Minimises the held-out loss of :math:`g + \sum_k \alpha_k s_k (w_k - g)` from :math:`\alpha =
    0`, with :math:`g = \sum_k q_k w_k` a good point (the center) and :math:`s_k \le 1` a bound for
    long deltas. :math:`\alpha` is free, so coefficients may be negative or exceed 1, yet sum to 1:
    :math:`c_k = s_k \alpha_k + (1 - \sum_j s_j \alpha_j) q_k`. Each outer iteration loads
    ``model_batch_size`` checkpoints and runs minibatch gradient steps on their :math:`\alpha` only
    (block coordinate descent). ``layerwise`` gives every layer its own (MEHL-Soup+);
    ``model_batch_size=None`` takes all checkpoints at once (HL-Soup). The soup, its center and the
    best checkpoint are compared on all held-out rows, and the best of them is the result.

    ``MEHLSoup(center="mean", clip_deltas=None, weight_decay=0)`` is the paper's: :math:`q_k = 1/K`,
    :math:`s_k = 1`, and nothing is compared.

    Its parameters by purpose:

    - *essential*: ``checkpoints``, ``layerwise``, ``task``, ``classes``, ``max_epochs``,
      ``random_state``;
    - *memory*: ``model_batch_size``, ``memory_limit``, ``delta_dtype``, ``batch_size``,
      ``accumulate``, ``prefetch``, ``shard``;
    - *optimiser*: ``lr``, ``optimizer``, ``weight_decay``, ``schedule``, ``model_epochs``,
      ``shuffle``;
    - *advanced*: ``center``, ``ranking_rows``, ``clip_deltas``, ``normalize``,
      ``validation_fraction``, ``criterion``, ``forward``, ``batch_norm``, ``precision``,
      ``compile``, ``device``, ``memory``.

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
    model_batch_size : int, None or "auto", default="auto"
        Checkpoints in memory at a time, b; None for all; "auto" for as many as ``memory_limit``
        holds.
    memory_limit : int, str or None, default=None
        Bytes, or a string such as "8GB", for b + 2 models and those read ahead (b + 1 on a
        GPU): it decides
        ``model_batch_size="auto"``, and a given model batch that it does not hold is an error. None
        is half of what the device has free, for "auto" only.
    delta_dtype : {"float32", "bfloat16"}, torch.dtype or None, default=None
        What the b deltas are held in; None is the dtype of the module. bfloat16 halves their
        memory; sums are formed in the module's dtype.
    shard : {None, "auto"}, default=None
        "auto" spreads the module, its gradient and the deltas over the ranks of a distributed job
        with PyTorch's FSDP2, block by block, for models that no device holds (docs: Several
        devices). None lets every rank hold the module, unless it was wrapped already.
    prefetch : int, default=1
        Models that a background thread reads ahead of their use, each in memory of its own (pinned
        host memory for CUDA); while it waits, the operating system reads the files of the next
        model batch into its cache. 0 reads everything when it is needed.
    lr : float, default=0.05
        Learning rate for :math:`\alpha`, in units of coefficients.
    max_epochs : int, default=5
        Passes over the held-out rows per model batch (inner iterations).
    model_epochs : int, default=1
        Passes over the checkpoints.
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
        Starts afresh with each model batch.
    weight_decay : float or "auto", default="auto"
        Of the optimizer, on :math:`\alpha`: towards the center. "auto" is 1000 / N, at most
        1 / ``lr``: against the mean loss of N rows a prior on :math:`\alpha` weighs 1 / N.
    schedule : {"cosine", "constant"}, default="cosine"
        Per model batch; cosine warms up over the first fifth of its steps.
    normalize : bool, default=False
        Scale every delta to unit length per layer during the search, as the authors' code does
        (with lr 0.01); the coefficients found are those of the deltas as they are.
    validation_fraction : float or None, default=None
        Part of the rows, drawn at random and stratified by label, that takes no part in the
        gradients and chooses, for each model batch, the epoch (or the start) with the least loss.
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
        Seeds the order of checkpoints and rows; never the global state.
    memory : str, path-like, joblib.Memory or None, default=None
        Where epochs are kept, so that a fit that was killed goes on where it was.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        Coefficients; rows sum to 1.
    center_ : ndarray of shape (n_checkpoints,), float64
        Coefficients :math:`q` of the center.
    held_out_scores_ : dict of str to float
        Task's score on all held-out rows of what was searched for ("soup"), of its "center", and of
        the "best" ranked checkpoint; not with ``center="mean"``, where nothing is compared.
    model_batch_size_ : int
        The resolved b, after any halving for lack of memory.
    module_ : nn.Module
        The soup, in eval mode, on the device.
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
        One per inner epoch: ``outer``, ``models`` (names), ``epoch``; ``loss``, ``grad_norm`` and,
        but for regressions, ``score`` (of the minibatch) at every step; ``validation_loss`` at its
        end, with ``validation_fraction``.
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
        With ``center="mean"``, the loss or the coefficients stopped being finite; its ``coef`` are
        those before that epoch.
    ValueError
        ``memory_limit`` does not hold the model batch asked for; ``center`` has another number of
        coefficients than there are checkpoints.

    Warns
    -----
    SoupWarning
        Memory ran out: the search starts again with half the model batch, and gives what it would
        have given with that size from the beginning. Or the loss stopped being finite, or what was
        found scores lower on the held-out rows than its center or the best checkpoint, which is the
        soup instead. Or extrapolation made a mixed variance of BatchNorm negative, which is set
        to 0.

    See Also
    --------
    LearnedSoup : Coefficients on the simplex.
    GreedySoup : No gradients needed.

    Notes
    -----
    The gradient needs no graph over K models: :math:`\partial L / \partial \alpha_k = \langle
    \nabla_w L(w), s_k (w_k - g) \rangle` (Eq. 6), one forward and backward pass of one model and
    an inner product per step. With D parameters, N held-out rows and ``batch_size`` n there are
    ``ceil(K / b) * max_epochs * ceil(N / n)`` steps per pass over the checkpoints; the ranking
    takes ``K * ranking_rows`` forward rows, the comparison 3 N. All files are read once to be
    checked and once to be ranked (neither with ``center="mean"``), those in the center once more,
    all once for the lengths of their deltas (not with the paper's settings), once per pass over
    the checkpoints, and once for the last `mix`. Memory beside the module, its gradient and its
    activations: b + 2 models (the deltas, the center, the soup), b/2 + 2 with bfloat16 deltas, and
    ``prefetch`` models more. On a GPU it is one less: the center is in host memory, as is what is
    read ahead. The docs' page on cost has the lower limit. Dropout is off and BatchNorm uses its
    mixed statistics, which carry no gradient.

    The bound is :math:`s_{kl} = \min(1, \mathrm{median}_j \lVert \delta_{jl} \rVert / \lVert
    \delta_{kl} \rVert)` with :math:`\delta_k = w_k - g`, over the lengths that are not 0. A
    layer's length is that of all the tensors that its coefficients mix, BatchNorm's statistics
    included. With ``validation_fraction`` the rows set aside take no part in choosing the center.

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
        """(b, n_searched), |delta| of each layer, with ``normalize``."""
        if not self.normalize:
            return None
        return deltas.norms() if cache is None else cache(("norms",), lambda: deltas.norms())

    def _set_aside(
        self, problem: Problem, fraction: float, generator: torch.Generator
    ) -> tuple[Problem, HeldOut]:
        """Set rows aside to choose the iterate by."""
        seed = int(torch.randint(2**31, (), generator=generator))
        y, data = problem.evaluate.y, problem.data
        aside, rest = split_rows(y, self.task, data.amounts, fraction, seed)
        evaluate = problem.evaluate.on(rest.numpy())
        return replace(problem, data=data.select(rest), evaluate=evaluate), data.select(aside)

    def _warn_of_halving(self, b: int) -> None:
        self._warn(
            f"Memory ran out: starting again with model_batch_size={b}. Give that, or a "
            f"memory_limit, to save the attempt; delta_dtype='bfloat16' halves the deltas."
        )
