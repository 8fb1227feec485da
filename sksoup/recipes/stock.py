"""Model Stock: between the pretrained start and the mean, by the angle of the fine-tunings."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.outputs import Task
from ..engine.batch_norm import BatchNormPolicy
from ..engine.center import distinct
from ..engine.objective import Forward
from ..engine.problem import Found, Problem
from ..mixing.layers import Layerwise
from ..mixing.stock import stock_coef, stock_ratios
from .base import BaseSoup
from .start import START, Start, name_of_start, with_start

__all__ = ["ModelStockSoup"]


@dataclass(eq=False, repr=False)
class ModelStockSoup(BaseSoup):
    r"""Mix the mean of all checkpoints with the pretrained start, by the angle between them.

    Fine-tunings of one start lie around a center that is nearer to the start than their mean. For
    each layer, :math:`w = t \bar w + (1 - t) w_0` with
    :math:`t = K \cos\theta / (1 + (K - 1) \cos\theta)`, where :math:`\theta` is the mean angle
    between the differences :math:`w_k - w_0`: few checkpoints suffice, and no held-out score is
    used. The held-out data fixes only the labels.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        What to mix; may be given to `fit` instead.
    start : str, path-like, mapping of str to Tensor, or nn.Module, default="start"
        The pretrained start :math:`w_0`: the name of a checkpoint of the collection, or, where none
        has that name, a file, folder, state dict or module, which is added as "start". It has the
        tensors that the fine-tunings have, head included.
    layerwise : bool or callable, default=True
        True: an angle for every parameter, as the authors do; False: one for all; a callable maps a
        parameter's name to its layer's.
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

    Attributes
    ----------
    ratios_ : ndarray of shape (n_layers,), float64
        t of every layer, clipped to [0, 1]: 1 is the mean, 0 the start.
    cosines_ : ndarray of shape (n_layers,), float64
        Mean cosine between the differences from the start.
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        t / K of each fine-tuning, 1 - t of the start.
    checkpoints_ : CheckpointCollection
        What was mixed, with the start.
    module_ : nn.Module
        The soup, in eval mode, on the device.
    layers_ : dict of str to int
        Row of ``coef_`` for every tensor.
    ingredients_ : tuple of str
        Names with a coefficient other than 0.
    layer_names_ : tuple of str
        Names of the rows.
    classes_ : ndarray of shape (n_outputs,)
        Labels in output order (classification only).
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
    CheckpointError
        ``start`` is no checkpoint's name and can't be opened, or has other tensors.

    See Also
    --------
    UniformSoup : The mean alone.
    sksoup.inspection.interpolation_path : Scores all the way from the start to a soup.

    Notes
    -----
    Cost: two reads of each checkpoint, no passes. Memory: the start, and a sum in float64. A layer
    whose differences have no common direction (a cosine of 0 or less) is the start's; a single
    fine-tuning has no angle, and the soup is that.

    References
    ----------
    Jang et al., *Model Stock: All we need is just a few fine-tuned models*, ECCV 2024,
    arXiv:2403.19522, Eq. 5.

    Examples
    --------
    >>> import torch
    >>> from sksoup import CheckpointCollection, ModelStockSoup
    >>> nets = [torch.nn.Linear(2, 2) for _ in range(3)]
    >>> nets = CheckpointCollection(nets, names=["a", "b", "start"])
    >>> soup = ModelStockSoup(start="start").fit(nets, torch.eye(2), torch.tensor([0, 1]))
    >>> soup.coef_.shape, soup.layer_names_
    ((2, 3), ('weight', 'bias'))
    """

    checkpoints: Any = None
    _: KW_ONLY
    start: Start = START
    layerwise: Layerwise = True
    batch_norm: BatchNormPolicy = "average"
    forward: Forward | None = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    batch_size: int | None = 128
    device: str | torch.device = "auto"

    def _problem(
        self, collection: CheckpointCollection, X: Any, y: Any, weight: NDArray[np.float64] | None
    ) -> Problem:
        return super()._problem(with_start(collection, self.start), X, y, weight)

    def _search(self, problem: Problem) -> Found:
        checkpoints = problem.checkpoints
        start = name_of_start(checkpoints, self.start)
        parameters = {name for name, w in distinct(problem.module) if isinstance(w, nn.Parameter)}
        with problem.progress("average", 0):
            ratios, cosines = stock_ratios(checkpoints, start, problem.layers, parameters)
            coef = stock_coef(checkpoints, start, ratios)
            return Found(coef, attributes={"ratios_": ratios, "cosines_": cosines})
