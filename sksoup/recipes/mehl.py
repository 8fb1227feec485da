"""MEHL-Soup: block coordinate descent in the hyperplane of the checkpoints [L24, Algorithm 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_scalar

from ..checkpoints.collection import CheckpointCollection
from ..data.rows import HeldOut, Task
from ..engine.batch_norm import BatchNormPolicy
from ..engine.deltas import Center, ModelBatch, ShardedBatch, centered, resolve_delta_dtype
from ..engine.descent import (
    NotFiniteError,
    check_search,
    check_settings,
    coefficient_dtype,
    descend,
    halve,
    memo_of,
    remembered_generator,
    settings_of,
    what_fitted,
)
from ..engine.objective import Criterion, Forward
from ..engine.on_demand import OnDemand
from ..engine.problem import Found, Problem, Step, rank
from ..engine.reader import Reader
from ..exceptions import DivergenceError
from ..mixing.layers import Layers, Layerwise
from ..runtime.cache import Memo
from ..runtime.distributed import least_over_ranks, n_ranks, share
from ..runtime.memory import Budget, is_out_of_memory, parse_bytes
from .base import BaseSoup
from .greedy import GreedySoup, check_fraction, split_rows

__all__ = ["MEHLSoup"]

STARTS = ("mean", "greedy", "best")


def affine_coef(alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients of w-bar + sum_k alpha_k (w_k - w-bar): (n_rows, K), rows sum to 1."""
    coef: NDArray[np.float64] = alpha + (1 - alpha.sum(axis=1, keepdims=True)) / alpha.shape[1]
    return coef


def draw_model_batches(
    n: int, b: int, model_epochs: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Split a new random order of the n checkpoints into batches of b, model_epochs times."""
    for _ in range(model_epochs):
        order = torch.randperm(n, generator=generator).tolist()
        yield from (order[start : start + b] for start in range(0, n, b))


def no_step(weights: Any = None) -> None:
    """Tell nobody: the steps that are shown are those of the descent."""


def has_files(checkpoints: CheckpointCollection) -> bool:
    """Whether any checkpoint has to be read from a file."""
    return any(checkpoints.path(name) is not None for name in checkpoints)


class MEHLSoup(BaseSoup):
    r"""Learn coefficients in the hyperplane of the checkpoints, a few checkpoints at a time.

    Minimises the held-out loss of :math:`\bar w + \sum_k \alpha_k (w_k - \bar w)` with
    :math:`\bar w` the mean and :math:`\alpha` free, so coefficients may be negative or exceed 1,
    yet sum to 1: :math:`c_k = \alpha_k + (1 - \sum_j \alpha_j) / K`. Each outer iteration loads
    ``model_batch_size`` checkpoints and runs minibatch gradient steps on their :math:`\alpha` only
    (block coordinate descent). ``layerwise`` gives every layer its own (MEHL-Soup+);
    ``model_batch_size=None`` takes all checkpoints at once (HL-Soup).

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    layerwise : bool or callable, default=False
        True gives every parameter tensor its own coefficients; a callable maps a parameter's name
        to the label of its layer.
    model_batch_size : int, None or "auto", default="auto"
        Checkpoints in memory at a time, b; None for all; "auto" for as many as ``memory_limit``
        holds.
    start : {"mean", "greedy", "best"}, default="mean"
        Where :math:`\alpha` begins: at 0, the mean of all checkpoints, as in the paper; at the
        `GreedySoup`; or at the best checkpoint. "best" costs a ranking (none when the collection
        has ``scores``), "greedy" that and its candidates. The deltas are those from the mean of all
        throughout, failed ones included.
    memory_limit : int, str or None, default=None
        Bytes, or a string such as "8GB", for b + 2 models and those read ahead: it decides
        ``model_batch_size="auto"``, and a given model batch that it does not hold is an error. None
        is half of what the device has free, for "auto" only.
    delta_dtype : {"float32", "bfloat16"}, torch.dtype or None, default=None
        What the b deltas are held in; None is the dtype of the module. bfloat16 halves their
        memory; sums are formed in the module's dtype.
    shard_deltas : bool, default=False
        Whether the ranks of a distributed job share the deltas out, for model batches that one
        device does not hold. A step then sends 2 D numbers more.
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
    compile : bool, default=False
        Whether to run the search through ``torch.compile``.
    optimizer : {"adamw", "sgd"}, default="adamw"
        Starts afresh with each model batch.
    weight_decay : float, default=0.0
        Of the optimizer, on :math:`\alpha`: towards the mean of all checkpoints.
    schedule : {"cosine", "constant"}, default="cosine"
        Per model batch; cosine warms up over the first fifth of its steps.
    normalize : bool, default=False
        Scale every delta to unit length per layer during the search, as the authors' code does
        (with lr 0.01); the coefficients found are those of the deltas as they are.
    average : bool, default=False
        Whether a model batch ends at the mean of the iterates of the second half of its steps.
    validation_fraction : float or None, default=None
        Part of the rows, drawn at random and stratified by label, that takes no part in the
        gradients and chooses, for each model batch, the epoch (or the start) with the least loss.
    clip_grad_norm : float or None, default=None
        Upper bound for the norm of the coefficients' gradient.
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
        ``(module, X) -> outputs`` for modules that are not called as ``module(X)``, ``module(**X)``
        (X a dict) or ``module(*X)`` (a tuple).
    task : {"classification", "regression", "multilabel"}, default="classification"
        What the outputs mean.
    classes : array-like of shape (n_outputs,) or None, default=None
        Labels in output order; by default the sorted labels in ``y`` when there are as many as
        outputs, else 0, 1, ....
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
        The loss or the coefficients stopped being finite; its ``coef`` are those before that epoch.
    ValueError
        ``memory_limit`` does not hold the model batch asked for; ``average=True`` together with
        ``validation_fraction``.

    Warns
    -----
    SoupWarning
        Memory ran out: the search starts again with half the model batch, and gives what it would
        have given with that size from the beginning. Or extrapolation made a mixed variance of
        BatchNorm negative, which is set to 0.

    See Also
    --------
    LearnedSoup : Coefficients on the simplex.
    GreedySoup : No gradients needed.

    Notes
    -----
    The gradient needs no graph over K models: :math:`\partial L / \partial \alpha_k = \langle
    \nabla_w L(w), w_k - \bar w \rangle` (Eq. 6), one forward and backward pass of one model and an
    inner product per step. With D parameters, N held-out rows and ``batch_size`` n there are
    ``ceil(K / b) * max_epochs * ceil(N / n)`` steps per pass over the checkpoints, which are read
    ``2 + model_epochs`` times. Memory beside the module, its gradient and its activations: b + 2
    models (the deltas, the mean, the soup), b/2 + 2 with bfloat16 deltas, and ``prefetch`` models
    more. The docs' page on cost tells what the floor is. Dropout is off and BatchNorm uses its
    mixed statistics, which carry no gradient.

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

    def __init__(
        self,
        checkpoints: Any = None,
        *,
        layerwise: Layerwise = False,
        model_batch_size: int | str | None = "auto",
        memory_limit: int | str | None = None,
        delta_dtype: str | torch.dtype | None = None,
        shard_deltas: bool = False,
        prefetch: int = 1,
        lr: float = 0.05,
        max_epochs: int = 5,
        model_epochs: int = 1,
        batch_size: int | None = 128,
        accumulate: int = 1,
        precision: str = "fp32",
        compile: bool = False,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        schedule: str = "cosine",
        start: str = "mean",
        normalize: bool = False,
        average: bool = False,
        validation_fraction: float | None = None,
        clip_grad_norm: float | None = None,
        shuffle: bool = True,
        criterion: Criterion | None = None,
        batch_norm: BatchNormPolicy = "average",
        forward: Forward | None = None,
        task: Task = "classification",
        classes: ArrayLike | None = None,
        device: str | torch.device = "auto",
        random_state: Any = None,
        memory: Any = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.layerwise = layerwise
        self.model_batch_size = model_batch_size
        self.memory_limit = memory_limit
        self.delta_dtype = delta_dtype
        self.shard_deltas = shard_deltas
        self.prefetch = prefetch
        self.lr = lr
        self.max_epochs = max_epochs
        self.model_epochs = model_epochs
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.precision = precision
        self.compile = compile
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.start = start
        self.normalize = normalize
        self.average = average
        self.validation_fraction = validation_fraction
        self.clip_grad_norm = clip_grad_norm
        self.shuffle = shuffle
        self.criterion = criterion
        self.batch_norm = batch_norm
        self.forward = forward
        self.task = task
        self.classes = classes
        self.device = device
        self.random_state = random_state
        self.memory = memory

    def _check_params(self) -> None:
        super()._check_params()
        check_settings(self)
        b = self.model_batch_size
        is_count = isinstance(b, Integral) and not isinstance(b, bool) and b >= 1
        if not (b is None or b == "auto" or is_count):
            raise ValueError(f"model_batch_size must be an int >= 1, None or 'auto', got {b!r}.")
        check_scalar(self.prefetch, "prefetch", Integral, min_val=0)
        check_scalar(self.weight_decay, "weight_decay", Real, min_val=0)
        if self.start not in STARTS:
            raise ValueError(
                f"start must be one of {', '.join(map(repr, STARTS))}, got {self.start!r}."
            )
        check_fraction(self.validation_fraction, "validation_fraction")
        if self.average and self.validation_fraction is not None:
            raise ValueError(
                "average=True and validation_fraction both say which iterate is kept: give one."
            )
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)

    def _search(self, problem: Problem) -> Found:
        rows = self.validation_fraction
        memo = memo_of(self, problem, self.normalize, self.model_epochs, self.start, rows)
        generator = remembered_generator(self.random_state, memo)
        seed = generator.get_state()
        whole = problem
        problem, choose = self._hold_back(whole, generator)
        check_search(self, problem, problem.data, *([] if choose is None else [choose]))
        alpha = self._start(whole)
        memo = memo.within(seed, alpha)
        with OnDemand(lambda: centered(problem)) as center:
            b = self._resolve(problem, center, memo)
            self._warn_of_strangers(problem.checkpoints, problem.checkpoints.names)
            while b:
                generator.set_state(seed)
                found = self._descend(problem, choose, center, alpha.copy(), b, generator, memo)
                if found is not None:
                    return found
                b = self._halve(b, memo)
        n = len(problem.checkpoints)  # all checkpoints are equal
        return Found(affine_coef(alpha.T), attributes={"model_batch_size_": n})

    def _start(self, problem: Problem) -> NDArray[np.float64]:
        """(K, n_searched): the alphas it begins with."""
        alpha = np.zeros((len(problem.checkpoints), problem.layers.n_searched))
        if self.start == "mean":
            return alpha
        if self.start == "best":
            problem.checkpoints.check()
            scores = rank(problem, no_step).scores
            alpha[list(scores).index(max(scores, key=scores.__getitem__))] = 1
            return alpha
        problem = replace(problem, progress=lambda name, n: nullcontext(no_step))
        greedy = GreedySoup(task=self.task, batch_norm=self.batch_norm, batch_size=self.batch_size)
        alpha += greedy._find(problem).coef.T  # sums to 1, as alphas of the mean of a subset do
        return alpha

    def _hold_back(
        self, problem: Problem, generator: torch.Generator
    ) -> tuple[Problem, HeldOut | None]:
        """Set rows aside to choose the iterate by."""
        if self.validation_fraction is None:
            return problem, None
        seed = int(torch.randint(2**31, (), generator=generator))
        y, data = problem.evaluate.y, problem.data
        chooses, fits = split_rows(y, self.task, data.amounts, self.validation_fraction, seed)
        return replace(problem, data=data.select(fits)), data.select(chooses)

    def _resolve(self, problem: Problem, center: OnDemand[Center | None], memo: Memo) -> int:
        """The model batch; the one that was found to fit, if the fit goes on; 0 if all are equal.

        B deltas beside the mean, the soup, and what is read ahead (into the host's memory).
        """

        def resolve() -> int:
            if (found := center()) is None:
                return 0
            mean = found.mean
            dtype = resolve_delta_dtype(self.delta_dtype, mean.dtype)
            is_host = mean.device.type == "cpu" and has_files(problem.checkpoints)
            limit = None if self.memory_limit is None else parse_bytes(self.memory_limit)
            n_fixed = 2 + self.prefetch * is_host
            delta_bytes = len(mean) * dtype.itemsize // self._n_shards()
            budget = Budget(limit, mean.nbytes, delta_bytes, n_fixed, mean.device)
            wanted = self.model_batch_size
            return least_over_ranks(budget.resolve(wanted, len(problem.checkpoints)))

        key = ("model batch", self.model_batch_size, self.memory_limit, self.prefetch)
        return what_fitted(memo(key, resolve), memo)

    def _n_shards(self) -> int:
        """Over how many ranks the deltas are spread."""
        return n_ranks() if self.shard_deltas else 1

    def _halve(self, b: int, memo: Memo) -> int:
        """Go on with half, and remember it."""
        half = halve(b, memo)
        self._warn(
            f"Memory ran out: starting again with model_batch_size={half}. Give that, or a "
            f"memory_limit, to save the attempt; delta_dtype='bfloat16' halves the deltas."
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return half

    def _descend(
        self,
        problem: Problem,
        choose: HeldOut | None,
        center: OnDemand[Center | None],
        alpha: NDArray[np.float64],
        b: int,
        generator: torch.Generator,
        memo: Memo,
    ) -> Found | None:
        """Algorithm 1: alpha (K, n_searched) persists; each outer iteration moves b checkpoints'.

        Gives None when the memory does not hold them.
        """
        checkpoints, layers = problem.checkpoints, problem.layers
        n = len(checkpoints)
        history: list[dict[str, Any]] = []
        # from the mean to the start
        begun = [int(k) for k in np.flatnonzero(alpha.any(axis=1))]
        starts = [begun[i : i + b] for i in range(0, len(begun), b)]
        moves: list[Move] = [
            (tuple(checkpoints.names[k] for k in members), alpha[members]) for members in starts
        ]
        outers = list(draw_model_batches(n, b, self.model_epochs, generator))
        try:
            with (
                OnDemand(lambda: self._soup(problem, center(), b, starts + outers)) as soup,
                problem.progress("epoch", len(outers) * self.max_epochs) as step,
            ):
                for outer, members in enumerate(outers):
                    names = tuple(checkpoints.names[k] for k in members)
                    models = cache(lambda names=names: soup().load(names, moves))
                    try:
                        moved, records = self._inner(
                            problem, choose, models, alpha[members], generator,
                            memo.within(b, outer), step,
                        )  # fmt: skip
                    except NotFiniteError as error:
                        alpha[members] += error.coef
                        raise DivergenceError(
                            f"The loss or the coefficients stopped being finite at outer iteration "
                            f"{outer + 1} of {len(outers)}, step {error.step}. Lower lr (now "
                            f"{self.lr}).",
                            layers.expand(affine_coef(alpha.T)),
                        ) from error
                    alpha[members] += moved
                    moves.append((names, moved))
                    if models.cache_info().currsize:  # else it is known from an earlier fit
                        soup().commit(moved)
                    history += [{"outer": outer, "models": names, **record} for record in records]
        except (MemoryError, RuntimeError) as error:
            if b == 1 or n_ranks() > 1 or not is_out_of_memory(error):
                raise
            return None
        return Found(affine_coef(alpha.T), history, {"model_batch_size_": b})

    @contextmanager
    def _soup(
        self, problem: Problem, center: Center | None, b: int, outers: list[list[int]]
    ) -> Iterator[Soup]:
        """The soup at the center, with room for a model batch, and what reads ahead."""
        if center is None:  # pragma: no cover - then there is no model batch
            raise RuntimeError("no center")
        dtype = resolve_delta_dtype(self.delta_dtype, center.mean.dtype)
        checkpoints = problem.checkpoints
        kind, part = (ShardedBatch, share) if self._n_shards() > 1 else (ModelBatch, slice)
        order = [checkpoints.names[k] for members in outers for k in members[part(len(members))]]
        reader: AbstractContextManager[Reader | None] = nullcontext()
        if self.prefetch and has_files(checkpoints):
            ahead = min(self.prefetch, len(order))
            reader = Reader(checkpoints, center.layout, order, center.mean, ahead, b)
        with kind(center, b, dtype) as batch, reader as opened:
            yield Soup(batch, opened, checkpoints, problem.layers)

    def _inner(
        self,
        problem: Problem,
        choose: HeldOut | None,
        models: Callable[[], ModelBatch],
        alpha: NDArray[np.float64],
        generator: torch.Generator,
        memo: Memo,
        step: Step,
    ) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Inner iterations on one model batch, from alpha (b, n_searched); returns how it moved."""
        device, n_rows = problem.data.y.device, problem.layers.n_searched
        dtype = coefficient_dtype(device)
        start = torch.as_tensor(alpha, dtype=dtype, device=device)
        unit = torch.ones((), dtype=dtype, device=device)
        if self.normalize:
            unit = memo(("norms",), lambda: models().norms(n_rows)).to(start).reciprocal()
        v = (start / unit).requires_grad_()  # alpha = unit * v

        def moved() -> torch.Tensor:
            return v * unit - start

        records = descend(
            models, problem, moved, [v], settings_of(self), generator, memo, choose=choose,
            on_epoch=step,
        )  # fmt: skip
        return moved().detach().cpu().double().numpy(), records


Move: TypeAlias = tuple[tuple[str, ...], NDArray[np.float64]]  # names, how far (b, n_searched)


class Soup:
    """The soup that outer iterations have moved; what an earlier fit moved is only read again."""

    def __init__(
        self,
        batch: ModelBatch,
        reader: Reader | None,
        checkpoints: CheckpointCollection,
        layers: Layers,
    ) -> None:
        self._batch, self._reader = batch, reader
        self._checkpoints, self._layers = checkpoints, layers
        self._n_made = 0

    def load(self, names: tuple[str, ...], moves: Sequence[Move]) -> ModelBatch:
        """The model batch of these names, over the soup that all moves so far lead to."""
        for past, moved in moves[self._n_made :]:
            self._batch.load(self._checkpoints, past, self._reader)
            self.commit(moved)
        self._batch.load(self._checkpoints, names, self._reader)
        return self._batch

    def commit(self, moved: NDArray[np.float64]) -> None:
        """W <- w + sum_k in batch of moved_k (w_k - w-bar)."""
        device = self._batch.center.device
        coef = torch.as_tensor(moved, dtype=coefficient_dtype(device), device=device)
        self._batch.combine(self._layers.expand_columns(coef))
        self._batch.commit()
        self._n_made += 1
