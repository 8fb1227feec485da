"""Learned-Soup: coefficients on the simplex, by gradient descent [W22, Appendix I]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ._base import BaseSoup
from ._data import Task
from ._descent import (
    NotFiniteError,
    check_settings,
    coefficient_dtype,
    descend,
    private_generator,
    settings_of,
)
from ._layout import Layerwise
from ._model_batch import model_batches
from ._objective import Criterion, Found, Problem
from .exceptions import DivergenceError

__all__ = ["LearnedSoup"]


class LearnedSoup(BaseSoup):
    r"""Learn coefficients on the simplex, and a temperature, on held-out data.

    Gradient descent on :math:`c = \mathrm{softmax}(a)`, from :math:`c_k = 1/K`, for the loss of
    :math:`\beta f(x; \sum_k c_k w_k)`; one softmax per layer with ``layerwise`` (Learned-Soup+).

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    layerwise : bool or callable, default=False
        True gives every parameter tensor its own coefficients; a callable maps a parameter's name
        to the label of its layer.
    temperature : bool, default=True
        Also learn a factor :math:`\beta` on the logits.
    lr : float, default=0.05
        Learning rate for :math:`a` and :math:`\beta`.
    max_epochs : int, default=5
        Passes over the held-out rows.
    batch_size : int or None, default=128
        Rows per step; None for all at once.
    optimizer : {"adamw", "sgd"}, default="adamw"
        Without weight decay.
    schedule : {"cosine", "constant"}, default="constant"
        Cosine warms up over the first fifth of the steps.
    clip_grad_norm : float or None, default=None
        Upper bound for the norm of the coefficients' gradient.
    shuffle : bool, default=True
        Visit the rows in a new random order each epoch.
    criterion : class, nn.Module, callable or None, default=None
        Loss ``(output, y) -> scalar or one per row``; by default cross-entropy, squared error or
        binary cross-entropy with logits, by ``task``.
    task : {"classification", "regression", "multilabel"}, default="classification"
        What the outputs mean.
    classes : array-like of shape (n_outputs,) or None, default=None
        Labels in output order; by default the sorted labels in ``y`` when there are as many as
        outputs, else 0, 1, ....
    device : str or torch.device, default="auto"
        Where the module runs; "auto" is cuda, else mps, else cpu.
    random_state : int, RandomState or None, default=None
        Seeds the order of the rows; never the global state.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        Coefficients in [0, 1]; rows sum to 1.
    temperature_ : float
        :math:`\beta`: multiplies the logits in `predict_proba`, never folded into the weights.
    module_ : nn.Module
        The soup, in eval mode, on the device; gives raw logits.
    layers_ : dict of str to int
        Row of ``coef_`` for every tensor.
    layer_names_ : tuple of str
        Names of the rows.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
    checkpoints_ : CheckpointCollection
        What was mixed.
    history_ : list of dict
        One per epoch: ``epoch``, and ``loss`` and ``grad_norm`` of every step.
    recipe_ : Recipe
        The record that `save` writes.

    Raises
    ------
    DivergenceError
        The loss or the coefficients stopped being finite.

    See Also
    --------
    MEHLSoup : The same without the simplex, in bounded memory.

    Notes
    -----
    No graph over K models is built: with :math:`\bar w` the mean, :math:`\sum_k c_k w_k = \bar w +
    \sum_k c_k (w_k - \bar w)`, and :math:`\partial L / \partial c_k = \langle \nabla_w L, w_k -
    \bar w \rangle` up to a constant that the softmax cancels. Cost: a forward and a backward pass
    per step, three reads of the checkpoints. Memory: K + 2 models beside the module and its
    gradient. Dropout is off and BatchNorm uses its mixed statistics, which carry no gradient.

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

    def __init__(
        self,
        checkpoints: Any = None,
        *,
        layerwise: Layerwise = False,
        temperature: bool = True,
        lr: float = 0.05,
        max_epochs: int = 5,
        batch_size: int | None = 128,
        optimizer: str = "adamw",
        schedule: str = "constant",
        clip_grad_norm: float | None = None,
        shuffle: bool = True,
        criterion: Criterion | None = None,
        task: Task = "classification",
        classes: ArrayLike | None = None,
        device: str | torch.device = "auto",
        random_state: Any = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.layerwise = layerwise
        self.temperature = temperature
        self.lr = lr
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip_grad_norm = clip_grad_norm
        self.shuffle = shuffle
        self.criterion = criterion
        self.task = task
        self.classes = classes
        self.device = device
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_settings(self)

    def _search(self, problem: Problem) -> Found:
        n, n_rows = len(problem.checkpoints), problem.layers.n_searched
        generator = private_generator(self.random_state)
        with (
            problem.progress("epoch", self.max_epochs) as step,
            model_batches(problem, None) as batch,
        ):
            if batch is None:  # all checkpoints are equal
                return Found(np.full((n_rows, n), 1 / n), attributes={"temperature_": 1.0})
            batch.load(problem.checkpoints, problem.checkpoints.names)
            dtype = coefficient_dtype(batch.center.device)
            a = batch.center.new_zeros((n, n_rows), dtype=dtype).requires_grad_()
            beta = batch.center.new_ones((), dtype=dtype).requires_grad_(self.temperature)
            try:
                history = descend(
                    batch,
                    problem,
                    coef=lambda: a.softmax(dim=0),
                    leaves=[a, beta] if self.temperature else [a],
                    settings=settings_of(self),
                    generator=generator,
                    scale=beta if self.temperature else None,
                    on_epoch=step,
                )
            except NotFiniteError as error:
                raise DivergenceError(
                    f"The loss or the coefficients stopped being finite at step {error.step}. "
                    f"Lower lr (now {self.lr}).",
                    problem.layers.expand(error.coef.T),
                ) from error
            coef = a.detach().softmax(dim=0).T.cpu().double().numpy()  # (n_searched, K)
        return Found(
            coef / coef.sum(axis=1, keepdims=True),
            history=history,
            attributes={"temperature_": float(beta.detach())},
        )
