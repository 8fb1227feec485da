"""Predictions and scores of a fitted soup, for rows in any form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.arrays import map_inputs, n_rows
from ..data.indexed import IndexedRows
from ..data.loaders import Pads, as_batches, is_apart, minibatches, padded, targets_of
from ..data.outputs import Outputs, Task, check_positions
from ..data.rows import is_loader, to_inputs, to_tensor
from ..data.tokens import (
    DECODER_INPUT,
    IGNORED,
    TEXT_TASKS,
    check_labels,
    row_losses,
    targets_from,
    with_decoder_inputs,
    without_ignored,
)
from ..engine.objective import Forward, feed, forward_in_batches, module_dtype
from .validation import input_names, to_numpy, validate_inputs


def _has_probabilities(soup: Any) -> bool:
    """Whether there are probabilities; for tokens they would not fit into memory."""
    if soup.task in TEXT_TASKS:
        raise AttributeError(
            "predict_proba is not available for language modeling: the result would have rows x "
            "tokens x vocabulary numbers. Use soup.module_(**X).logits for a few rows, or score "
            "for the mean log-likelihood."
        )
    return bool(soup.task != "regression")


def _part(what: str, values: Any, start: int, n: int) -> Any:
    """The labels or weights of n rows, or an error if there are fewer."""
    part = values[start : start + n]
    if len(part) < n:
        raise ValueError(
            f"{what} has {len(values):,} entries, fewer than X has rows. Expected one per row."
        )
    return part


def _check_rest(what: str, values: Any, n: int) -> None:
    """Raise an error if there are more labels or weights than rows."""
    if values is not None and len(values) != n:
        raise ValueError(
            f"{what} has {len(values):,} entries, but X has {n:,} rows. Expected one per row."
        )


class PredictionMixin:
    """Predict and score with the fitted ``module_``."""

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
            Inputs, as in `fit`. A loader may be larger than memory, but it must not shuffle.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Labels from ``classes_``; 0 and 1 for multi-label; targets in the module's dtype
            (float32) for regression. For language modeling, the ids of the most likely tokens, of
            shape (n_samples, n_tokens); with a causal model, each is the prediction of the next
            token.
        """
        if self.task in TEXT_TASKS:
            return self._predicted_tokens(X)
        outputs = self._outputs_and_targets(X, None, ordered=True)[0]
        return self.outputs_.decode(outputs)

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Predict probabilities: softmax of the logits, sigmoid for multi-label.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...), dict, tuple, Dataset or DataLoader
            Inputs, as in `predict`.

        Returns
        -------
        p : ndarray of shape (n_samples, n_outputs), float32
            Columns in the order of ``classes_``, which is sorted. A learned ``temperature_`` is
            applied.
        """
        logits = self._outputs_and_targets(X, None, ordered=True)[0]
        p = self.outputs_.probabilities(logits * getattr(self, "temperature_", 1.0))
        return p.cpu().numpy()

    def _parts(self, X: Any, y: Any, ordered: bool) -> Iterator[tuple[Any, Any]]:
        """Inputs and labels of a few rows at a time; labels are None if there are none."""
        check_is_fitted(self, "coef_")
        if input_names(X) != self.input_names_:
            X = as_batches(X, y)
        size = self.batch_size if self.outputs_.is_dense else self._rows_at_once()
        pads: Pads | None = None
        if self.outputs_.is_text or self.outputs_.is_dense:
            pads = "causal" if self.outputs_.predicts == "causal" else "any"
        if is_loader(X):
            names = self.input_names_
            for rows, labels in minibatches(
                X, y, size, ordered=ordered, pads=pads,
                n_inputs=names if isinstance(names, int) else None,
            ):  # fmt: skip
                yield validate_inputs(self, rows), labels
            return
        X = validate_inputs(self, X)
        n = n_rows(X)
        parts = [slice(start, start + (size or n)) for start in range(0, n, size or n)]
        if isinstance(X, IndexedRows):
            inputs: Iterator[Any] = X.walk(size or n)
        else:
            inputs = (map_inputs(itemgetter(part), X) for part in parts)
        for rows, part in zip(inputs, parts, strict=True):
            yield rows, None if y is None else y[part]

    def _network(self) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
        """A module of the architecture, and a function that returns the logits of some rows."""
        return self.module_, partial(self._module_outputs, self.module_)

    def _predicted_tokens(self, X: Any) -> NDArray[np.int64]:
        """The most likely token at each position; shorter rows are padded with -100."""
        check_is_fitted(self, "coef_")
        kind, (_, logits_of) = self.outputs_.predicts, self._network()
        names = self.input_names_
        if kind == "seq2seq" and not (isinstance(names, tuple) and DECODER_INPUT in names):
            raise ValueError(
                f"predict needs the decoder's inputs {DECODER_INPUT!r} in X, as in fit, because a "
                f"sequence-to-sequence model predicts one token after the other. To generate texts "
                f"use soup.module_.generate(**X)."
            )
        parts = [
            torch.as_tensor(self.outputs_.decode(logits_of(rows)))
            for rows, _ in self._parts(X, None, ordered=True)
        ]
        found: NDArray[np.int64] = torch.cat(padded(parts, IGNORED)).numpy()
        return found

    @available_if(  # type: ignore[untyped-decorator]
        lambda self: self.task == "classification" or self.task in TEXT_TASKS
    )
    def mean_log_likelihood(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the mean log-likelihood of the labels (the negative log-loss), in minibatches.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...), dict, tuple, Dataset or DataLoader
            Inputs, as in `fit`.
        y : array-like or Tensor of shape (n_samples,) or (n_samples, ...), default=None
            Labels, also of pixels or tokens, with -100 (or the ``ignore_index`` of ``criterion``)
            at positions to ignore. None if the batches contain them or, for causal language models,
            if the inputs are the labels.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows.

        Returns
        -------
        score : float
            Mean over all labels, each with the weight of its row; at most 0. For a language model
            it is -log(perplexity), which is also what `score` returns.

        Raises
        ------
        ValueError
            ``y`` holds labels that are not in ``classes_``; ``y`` or ``sample_weight`` has another
            length than X; or there are no labels with a weight.
        """
        weight = None if sample_weight is None else np.asarray(to_numpy(sample_weight), dtype=float)
        total = amount = 0.0
        done = 0
        for losses, counted in self._row_losses(X, y, weight is not None):
            n = len(losses)
            w = np.ones(n) if weight is None else _part("sample_weight", weight, done, n)
            total += float(w @ losses)
            amount += float(w @ counted)
            done += n
        _check_rest("sample_weight", weight, done)
        if not amount > 0:
            raise ValueError(
                "score needs labels, but y ignores all positions, or all weights are 0."
            )
        return -total / amount

    def _row_losses(
        self, X: Any, y: Any, ordered: bool
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Log-losses by the minibatch, (n,) each: their sum over a row's labels, and the number."""
        check_is_fitted(self, "coef_")
        reads, (module, logits_of) = self.outputs_, self._network()
        apart = to_numpy(y) if is_apart(y) else None
        done = 0
        for rows, own in self._parts(X, y, ordered or apart is not None):
            n = n_rows(rows)
            labels = own if apart is None else _part("y", apart, done, n)
            if labels is None and reads.predicts == "causal":
                labels = targets_from(rows)
            if labels is None:
                raise ValueError("score needs y, or batches that contain the labels.")
            labels = np.asarray(to_numpy(labels))
            labels = without_ignored(labels, reads.ignored) if reads.is_text else labels
            rows = with_decoder_inputs(module, rows, labels, reads.predicts)
            yield self._losses(logits_of(rows), labels)
            done += n
        _check_rest("y", apart, done)

    def _losses(
        self, logits: torch.Tensor, y: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """For each row, the sum of the log-losses of its labels and their number, (n,) each."""
        reads = self.outputs_
        if reads.is_text:
            check_labels(y, reads.predicts, tuple(logits.shape[1:]), None, is_part=True)
        else:  # move the classes to the last axis, as for tokens
            logits = logits.movedim(1, -1) * getattr(self, "temperature_", 1.0)
            check_positions(y, tuple(logits.shape[:-1]))
        targets = reads.encode(y, logits.dtype, logits.device)
        n = len(targets)
        logits = logits.reshape(n, -1, logits.shape[-1])
        losses = row_losses(logits, targets.reshape(n, -1)).double().cpu().numpy()
        counted = (targets != IGNORED).reshape(n, -1).sum(dim=1).cpu().numpy()
        return losses, counted

    def _outputs_and_targets(self, X: Any, y: Any, ordered: bool) -> tuple[torch.Tensor, Any]:
        """Raw outputs and targets of rows; a loader is read once, never as a whole."""
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
        """How many rows of a loader are in memory at a time; None for all."""
        return self.batch_size

    def _outputs_of(self, X: Any) -> torch.Tensor:
        return self._module_outputs(self.module_, X)

    def _module_outputs(self, module: nn.Module, X: Any) -> torch.Tensor:
        device, dtype = next(module.parameters()).device, module_dtype(module)
        # the copies that a search passes to its scorer have no collection
        collection = getattr(self, "checkpoints_", None)
        with nullcontext() if collection is None else collection.threads_of_parent():
            return forward_in_batches(
                lambda rows: feed(
                    module, to_inputs(rows, dtype, device), self.outputs_, self.forward
                ),
                X if isinstance(X, IndexedRows) else map_inputs(to_tensor, X),
                self.batch_size,
            )

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Score the predictions: accuracy, or R² for ``task="regression"``.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...), dict, tuple, Dataset or DataLoader
            Inputs, as in `fit`.
        y : array-like or Tensor of shape (n_samples,) or (n_samples, n_outputs), default=None
            Labels or targets, as in `fit`; labels to ignore are left out. None, or the name of a
            key, if the batches contain them.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows.

        Returns
        -------
        score : float
            Greater is better. For ``task="multilabel"`` it is the subset accuracy, for language
            modeling the mean log-likelihood of a token, -log(perplexity).
        """
        if self.task in TEXT_TASKS:
            return float(self.mean_log_likelihood(X, y, sample_weight))
        ordered = is_apart(y) or is_apart(sample_weight)
        outputs, y = self._outputs_and_targets(X, y, ordered)
        if y is None:
            raise ValueError("score needs y, or batches that contain the targets.")
        reads = self.outputs_
        return reads.score(to_numpy(y), reads.decode(outputs), sample_weight)
