"""Predictions of a fitted soup, for rows in any form."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.loaders import as_batches, is_apart, minibatches, targets_of
from ..data.outputs import Outputs, Task
from ..data.rows import is_loader, map_inputs, to_inputs, to_tensor
from ..engine.objective import Forward, feed, forward_in_batches, module_dtype
from .validation import input_names, to_numpy, validate_inputs


class PredictionMixin:
    """Predict and score, with the fitted ``module_``."""

    task: Task
    forward: Forward | None
    batch_size: int | None
    module_: nn.Module
    checkpoints_: CheckpointCollection
    outputs_: Outputs
    input_names_: tuple[str, ...] | int | None

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict labels or targets.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...), dict, tuple, Dataset or DataLoader
            Inputs, as in `fit`; a loader may be larger than memory, and must not shuffle.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Labels from ``classes_``; 0 and 1 for multi-label; the module's dtype (float32) for
            regression.
        """
        outputs = self._outputs_and_targets(X, None, ordered=True)[0]
        return self.outputs_.decode(outputs)

    @available_if(lambda self: self.task != "regression")  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Predict probabilities: softmax of the logits, sigmoid for multi-label.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...), dict, tuple, Dataset or DataLoader
            Inputs, as in `predict`.

        Returns
        -------
        p : ndarray of shape (n_samples, n_outputs), float32
            Columns in the order of ``classes_``. A learned ``temperature_`` is applied.
        """
        logits = self._outputs_and_targets(X, None, ordered=True)[0]
        p = self.outputs_.probabilities(logits * getattr(self, "temperature_", 1.0))
        return p.cpu().numpy()

    def _outputs_and_targets(self, X: Any, y: Any, ordered: bool) -> tuple[torch.Tensor, Any]:
        """Raw outputs and targets of rows; a loader is walked once and never held whole."""
        check_is_fitted(self, "coef_")
        if input_names(X) != self.input_names_:
            X = as_batches(X, y)
        if not is_loader(X):
            return self._outputs_of(validate_inputs(self, X)), y
        names = self.input_names_
        n_inputs = names if isinstance(names, int) else None
        outputs, targets = [], []
        for rows, labels in minibatches(
            X, y, self._rows_at_once(), ordered=ordered, n_inputs=n_inputs
        ):
            outputs.append(self._outputs_of(validate_inputs(self, rows)))
            targets.append(labels)
        return torch.cat(outputs), targets_of(targets, y)

    def _rows_at_once(self) -> int | None:
        """How many rows of a loader are in memory while it is walked; None for all."""
        return self.batch_size

    def _outputs_of(self, X: Any) -> torch.Tensor:
        return self._module_outputs(self.module_, X)

    def _module_outputs(self, module: nn.Module, X: Any) -> torch.Tensor:
        device, dtype = next(module.parameters()).device, module_dtype(module)
        # those that a search has its scorer look at hold no collection
        collection = getattr(self, "checkpoints_", None)
        with nullcontext() if collection is None else collection.threads_of_parent():
            return forward_in_batches(
                lambda rows: feed(
                    module, to_inputs(rows, dtype, device), self.forward, self.outputs_.one_logit
                ),
                map_inputs(to_tensor, X),
                self.batch_size,
            )

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Score the predictions: accuracy, or R² for ``task="regression"``.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...), dict, tuple, Dataset or DataLoader
            Inputs, as in `fit`.
        y : array-like or Tensor of shape (n_samples,) or (n_samples, n_outputs), default=None
            Labels or targets; None, or the name of a key, where they are in the batches.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows.

        Returns
        -------
        score : float
            Greater is better; subset accuracy for ``task="multilabel"``.
        """
        ordered = is_apart(y) or is_apart(sample_weight)
        outputs, y = self._outputs_and_targets(X, y, ordered)
        if y is None:
            raise ValueError("score needs y, or batches that hold the targets.")
        reads = self.outputs_
        return reads.score(to_numpy(y), reads.decode(outputs), sample_weight)
