"""Model Stock: between the pretrained weights and the mean, by the angle of the checkpoints."""

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
    r"""Interpolate between the pretrained weights and the mean of all checkpoints.

    Checkpoints that were fine-tuned from the same pretrained weights lie around a center that is
    closer to these weights than their mean is. For each layer, :math:`w = t \bar w + (1 - t) w_0`
    with :math:`t = K \cos\theta / (1 + (K - 1) \cos\theta)`, where :math:`\cos\theta` is the mean
    cosine between the differences :math:`w_k - w_0`. A few checkpoints are enough, and no held-out
    scores are used; the held-out data only determines the labels.

    Parameters
    ----------
    checkpoints : CheckpointCollection, callable, iterable or None, default=None
        Checkpoints to mix. They can also be passed to `fit`.
    start : str, path-like, mapping of str to Tensor, or nn.Module, default="start"
        The pretrained weights :math:`w_0`: the name or path of a checkpoint in the collection, or
        another file or folder, a state dict or a module, which is added to the collection as
        "start". They must have the same tensors as the fine-tuned checkpoints, including the head.
    layerwise : bool or callable, default=True
        If True, compute an angle for every parameter, as the authors do; if False, one for the
        whole model. A callable maps the name of a parameter to the label of its layer.
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

    Attributes
    ----------
    ratios_ : ndarray of shape (n_layers,), float64
        t of every layer, clipped to [0, 1]. 1 is the mean, 0 is the pretrained weights.
    cosines_ : ndarray of shape (n_layers,), float64
        Mean cosine between the differences from the pretrained weights, for every layer.
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        t / K for each fine-tuned checkpoint, 1 - t for the pretrained weights.
    checkpoints_ : CheckpointCollection
        The checkpoints that were mixed, including the pretrained weights.
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
    CheckpointError
        ``start`` is not the name of a checkpoint and can't be opened, or its tensors differ.

    See Also
    --------
    UniformSoup : The mean of the checkpoints.
    sksoup.inspection.interpolation_path : Scores between the pretrained weights and a soup.

    Notes
    -----
    Cost: two reads of each checkpoint and no forward passes. Memory: the pretrained weights and a
    sum in float64, of some layers at a time with ``layerwise`` (512 MiB, or the largest layer). A
    layer whose differences have no common direction (a cosine of 0 or less) keeps the pretrained
    weights. With a single fine-tuned checkpoint there is no angle, and the soup is that checkpoint.

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
        tensors = distinct(problem.module, checkpoints.layout)
        parameters = {name for name, w in tensors if isinstance(w, nn.Parameter)}
        with problem.progress("average", 0):
            ratios, cosines = stock_ratios(
                checkpoints, start, problem.layers, parameters, self._warn
            )
            coef = stock_coef(checkpoints, start, ratios)
            return Found(coef, attributes={"ratios_": ratios, "cosines_": cosines})
