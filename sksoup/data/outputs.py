"""Interpret the outputs of a module: targets from labels; labels and scores from outputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import accuracy_score, r2_score

from .labels import (
    check_ignored,
    check_rows,
    ignore_index_of,
    is_dense,
    output_names,
    resolve_classes,
    resolve_positions,
    some,
    void_remedy,
)
from .rows import Batch, to_tensor
from .tokens import (
    IGNORED,
    TEXT_TASKS,
    check_labels,
    kind_of_model,
    shifted,
)

Task: TypeAlias = Literal[
    "classification", "regression", "multilabel",
    "language-modeling", "causal-lm", "masked-lm", "seq2seq-lm",
]  # fmt: skip
TASKS = ("classification", "regression", "multilabel", *TEXT_TASKS)


@dataclass(frozen=True, eq=False)
class Outputs:
    """The interpretation of the outputs of a module for one kind of targets."""

    task: Task
    n_outputs: int
    shape: tuple[int, ...]  # of the output for one row
    classes: NDArray[Any] | None = None  # labels in output order, of a classification
    one_logit: bool = False  # the module gives z, which is used as the logits 0 and z
    has_channel: bool = False  # z of positions is (n, 1, ...), not (n, ...)
    ignored: int = IGNORED  # the criterion's target of what is left out, as labels also name it
    is_dense: bool = False  # labels at several positions of a row
    is_column: bool = False  # targets of a regression come as (n,)
    names: tuple[str, ...] | None = None  # of the outputs, where the module's config has some
    is_text: bool = False  # logits of tokens, (n, n_tokens, vocabulary)
    predicts: str = ""  # of texts: "causal", "masked" or "seq2seq"

    @classmethod
    def of(
        cls,
        output: torch.Tensor,
        y: NDArray[Any],
        task: Task,
        classes: ArrayLike | None = None,
        criterion: Any = None,
        call: str = "module(X)",
        module: Any = None,
        X: Any = None,
    ) -> Outputs:
        """Find it from the module's output for one row and the targets, or raise an error.

        ``call`` is the code that returns the outputs, for errors.
        """
        named = ignore_index_of(criterion)
        ignored = IGNORED if named is None else named
        dense = task == "classification" and is_dense(y)
        labels = y[(y != IGNORED) & (y != ignored)] if dense or task in TEXT_TASKS else y
        if not labels.size:
            raise ValueError(f"y contains only {some(np.unique(y))}, so every position is ignored.")
        if task in TEXT_TASKS:
            return cls._of_texts(output, y, kind_of_model(module, task), X, ignored)
        one_logit = task == "classification" and _is_one_logit(output, y)
        has_channel = one_logit and output.ndim > y.ndim
        if one_logit:
            _check_two(output, y, labels, classes)
            output = output.new_zeros((1, 2, *y.shape[1:]) if dense else (1, 2))  # as it is used
        _check_shape(output, y, task, call, module)
        n_outputs = output.shape[1] if output.ndim > 1 else 1
        if task != "classification":
            return cls(task, n_outputs, tuple(output.shape[1:]), is_column=y.ndim == 1)
        names = output_names(module, n_outputs)
        if dense and classes is None:
            found = resolve_positions(labels, n_outputs, named is not None)
        else:
            check_rows(y, n_outputs, ignored, classes)
            found = resolve_classes(labels, n_outputs, classes, names, dense)
        check_ignored(found, ignored, dense)
        return cls(
            task, n_outputs, tuple(output.shape[1:]), found, one_logit,
            has_channel, ignored, dense, names=names,
        )  # fmt: skip

    @classmethod
    def _of_texts(
        cls, output: torch.Tensor, y: NDArray[Any], kind: str, X: Any, ignored: int
    ) -> Outputs:
        if output.ndim != 3:
            raise ValueError(
                f"The module's output has shape {tuple(output.shape)} for one row, expected (1, "
                f"n_tokens, vocabulary) for task='language-modeling': logits of every token."
            )
        shape = tuple(output.shape[1:])
        check_labels(y, kind, shape, X)
        return cls(
            "language-modeling", shape[-1], shape, ignored=ignored, is_dense=True, is_text=True,
            predicts=kind,
        )  # fmt: skip

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Indices of the outputs in the sorted order of their labels."""
        return np.argsort([] if self.classes is None else self.classes)

    @property
    def labels(self) -> NDArray[Any] | list[NDArray[np.int64]] | None:
        """``classes_`` as in scikit-learn: sorted; for several labels per row, those of each."""
        if self.task == "multilabel":
            return [np.array([0, 1])] * self.n_outputs
        return None if self.classes is None else self.classes[self.order]

    @property
    def described(self) -> NDArray[Any] | tuple[str, ...]:
        """Names of the outputs if labels are their indices, otherwise the labels."""
        if self.classes is None:
            return ()
        is_number = np.array_equal(self.classes, np.arange(self.n_outputs))
        return self.names if is_number and self.names is not None else self.classes

    @property
    def leaves_out(self) -> bool:
        """Whether labels may be left out: at positions, or of a class that the criterion ignores.

        A row whose only label is no class has to be removed instead.
        """
        is_class = self.classes is not None and 0 <= self.ignored < self.n_outputs
        return self.is_dense or is_class

    def left_out(self, y: Any) -> NDArray[np.bool_]:
        """Where labels are left out of loss and score: -100 and the criterion's ignore_index."""
        y = np.asarray(y)
        if not self.leaves_out:
            return np.zeros(y.shape, dtype=bool)
        label: Any = self.ignored
        if self.classes is not None and 0 <= label < self.n_outputs:
            label = self.classes[label]
        found = np.asarray(y == label)
        return found | (y == IGNORED) if self.is_dense else found

    def labeled(self, y: Any) -> NDArray[np.bool_]:
        """Where labels count in a score; raise an error if those of positions are no classes."""
        y = np.asarray(y)
        found = ~self.left_out(y)
        if self.is_dense and self.classes is not None:
            is_other = found & ~np.isin(y, self.classes)
            if is_other.any():
                raise self._unknown(y, np.unique(y[is_other]))
        return found

    def encode(self, y: NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Targets: class indices (N, ...), -100 where they are left out, or floats (N, ...)."""
        if self.classes is not None:
            left_out = self.left_out(y)
            if not left_out.any():
                return to_tensor(self._indices(y)).to(device)
            found = self._indices(np.where(left_out, self.classes[0], y))
            return to_tensor(np.where(left_out, IGNORED, found)).to(device)
        if self.is_text:
            return to_tensor(shifted(y, self.predicts)).to(device)
        targets = to_tensor(np.asarray(y, dtype=np.float64)).reshape(len(y), -1)
        if targets.shape[1] != self.n_outputs:
            raise ValueError(
                f"y has {targets.shape[1]} targets per row, expected {self.n_outputs}: one per "
                f"output of the module."
            )
        if self.task == "multilabel" and not bool(((targets == 0) | (targets == 1)).all()):
            raise ValueError("y must hold only 0 and 1 for task='multilabel'.")
        return targets.to(device, dtype).reshape(len(y), *self.shape)

    def for_criterion(self, targets: torch.Tensor) -> torch.Tensor:
        """Encoded targets, with the criterion's own ignore_index where they are left out."""
        if self.ignored == IGNORED:
            return targets
        return targets.masked_fill(targets == IGNORED, self.ignored)

    def _indices(self, y: NDArray[Any]) -> NDArray[np.int64]:
        """The output of each label, or an error if there is none."""
        classes = np.asarray(self.classes)
        try:
            places = np.searchsorted(classes, y, sorter=self.order).clip(max=len(classes) - 1)
        except TypeError:  # labels of another type, which have no order among the classes
            places = np.zeros(y.shape, dtype=np.int64)
        indices: NDArray[np.int64] = self.order[places]
        is_other = np.asarray(classes[indices] != y)
        if is_other.any():
            known, found = classes.tolist(), dict.fromkeys(y[is_other].tolist())
            unknown = [label for label in found if label not in known]
            raise self._unknown(y, np.array(unknown, dtype=object))
        return indices

    def _unknown(self, y: NDArray[Any], labels: NDArray[Any]) -> ValueError:
        return ValueError(
            f"y holds labels that are not classes of the soup: {some(labels)}. Expected "
            f"{some(np.asarray(self.classes))}.{void_remedy(y, labels) if self.is_dense else ''}"
        )

    def two_logits(self, output: torch.Tensor) -> torch.Tensor:
        """(n, 2, ...) logits 0 and z of one logit z: their softmax is its sigmoid."""
        if not self.is_dense:
            z = output.reshape(len(output))
        else:
            z = output.squeeze(1) if self.has_channel else output
        return torch.stack([torch.zeros_like(z), z], dim=1)

    def counted(self, targets: torch.Tensor) -> torch.Tensor | None:
        """(N,): number of labeled positions of each row, if some positions have no label."""
        labeled = targets != IGNORED
        if not (self.is_text or self.classes is not None) or bool(labeled.all()):
            return None
        return labeled.reshape(len(targets), -1).sum(dim=1)

    def decode(self, outputs: torch.Tensor) -> NDArray[Any]:
        """Labels or targets from outputs (n, n_outputs, ...)."""
        if self.classes is not None:
            return np.asarray(self.classes[outputs.argmax(dim=1).cpu().numpy()])
        if self.is_text:
            return outputs.argmax(dim=-1).cpu().numpy()
        values = outputs.detach().cpu().numpy()
        if self.task == "multilabel":
            return (values > 0).astype(np.int64)
        return values.reshape(len(values)) if self.is_column else values.reshape(len(values), -1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over the outputs, in the order of `labels`; a sigmoid of each for several."""
        if self.task == "multilabel":
            return logits.sigmoid()
        order = torch.as_tensor(self.order, device=logits.device)
        return logits.softmax(dim=1).index_select(1, order)

    def right(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Weighted fraction of rows, or of pixels and tokens, with a correct prediction."""
        if self.classes is not None:
            right, counted = outputs.argmax(dim=1) == batch.y, batch.y != IGNORED
        else:
            right = ((outputs > 0) == (batch.y > 0)).reshape(len(batch.y), -1).all(dim=1)
            counted = torch.ones_like(right)
        weight = counted.to(outputs.dtype)
        if batch.weight is not None:
            weight = weight * batch.weight.reshape(-1, *[1] * (weight.ndim - 1))
        return (weight * right).sum() / weight.sum().clamp_min(1e-12)

    def score(self, y: Any, predicted: Any, weight: Any = None) -> float:
        """The default score of the task: accuracy, or R² for regression."""
        if self.task == "regression":
            return float(r2_score(y, predicted, sample_weight=weight))
        y = np.asarray(y)
        if self.leaves_out:
            check_positions(y, predicted.shape)
            used = self.labeled(y)  # positions, each with the weight of its row
            if weight is not None:
                weight = np.repeat(np.asarray(weight), used.reshape(len(used), -1).sum(axis=1))
            y, predicted = y[used], predicted[used]
        return float(accuracy_score(y, predicted, sample_weight=weight))


def check_positions(y: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise an error unless there is a label for each prediction, of rows, pixels or tokens."""
    if y.shape != shape:
        raise ValueError(
            f"y has shape {y.shape}, but the predictions have shape {tuple(shape)}, expected one "
            f"label for each, with {IGNORED} at positions to ignore."
        )


def _is_one_logit(output: torch.Tensor, y: NDArray[Any]) -> bool:
    """Whether the output for one row is a single logit of the row, or of each of its positions."""
    if not is_dense(y):
        return output.shape in ((1,), (1, 1))
    # (n, n_outputs) with y alike could also be several targets per row
    return output.shape[1:] == (1, *y.shape[1:]) or (y.ndim > 2 and output.shape[1:] == y.shape[1:])


def _check_two(
    output: torch.Tensor, y: NDArray[Any], labels: NDArray[Any], classes: ArrayLike | None
) -> None:
    """Check that the labels of one logit are two."""
    dense, labels = is_dense(y), np.unique(labels)
    if len(labels) > 2:
        per = " per position" if dense else ""
        numbers = "" if dense else ", or task='regression' if y holds numbers to predict"
        others = np.setdiff1d(labels, [0, 1] if classes is None else np.asarray(classes))
        remedy = void_remedy(y, others) if dense else ""
        raise ValueError(
            f"The module's output has shape {tuple(output.shape)} for one row: one logit{per} "
            f"distinguishes two labels, but y has {len(labels)} ({some(labels)}). Expected "
            f"{_expected(y)}{numbers}.{remedy}"
        )


def _check_shape(output: torch.Tensor, y: NDArray[Any], task: Task, call: str, module: Any) -> None:
    """Check the shape of the output for one row against the targets."""
    got = f"The module's output has shape {tuple(output.shape)} for one row"
    if task == "classification" and is_dense(y):
        if output.ndim < 3 or output.shape[2:] != y.shape[1:]:
            raise ValueError(
                f"{got}, but y has labels of shape {y.shape[1:]} per row, expected {_expected(y)}. "
                f"{_remedy(output, y, call)}"
            )
        if _has_labels_last(module) and not call.startswith("forward("):
            raise ValueError(
                f"{got}, which for {type(module).__name__} is (1, n_tokens, n_outputs), expected "
                f"(1, n_outputs, n_tokens). Move the axis of the outputs with forward=lambda "
                f"module, X: {call}.movedim(-1, 1)."
            )
    elif task == "classification" and output.ndim != 2:
        raise ValueError(f"{got}, expected (1, n_outputs) for task={task!r}.")
    elif output.ndim > 2:
        raise ValueError(
            f"{got}, expected (1, n_outputs) for task={task!r}. Flatten the outputs with "
            f"forward=lambda module, X: {call}.flatten(1), and y with y.reshape(len(y), -1)."
        )


def _has_labels_last(module: Any) -> bool:
    """Whether a module is a token classifier of transformers, whose logits are (n, tokens, labels).

    Unknown, so False, for a subclass with its own ``forward``.
    """
    where = getattr(getattr(type(module), "forward", None), "__module__", "")
    return where.startswith(("transformers", "peft.")) and any(
        kind.__name__.endswith("ForTokenClassification") for kind in type(module).__mro__
    )


def _expected(y: NDArray[Any]) -> str:
    """The shape of outputs for one row, in words."""
    return f"({', '.join(map(str, ('1', 'n_outputs', *(y.shape[1:] if is_dense(y) else ()))))})"


def _remedy(output: torch.Tensor, y: NDArray[Any], call: str) -> str:
    """What to do where the outputs and the labels have different positions."""
    if y.shape[1] == 1 and output.shape[2:] == y.shape[2:]:
        return "Remove the axis of length 1 from y: y[:, 0]."
    if output.ndim < 3 and y.ndim == 2:
        is_binary = bool(((y == 0) | (y == 1)).all())
        kind, task = ("labels", "multilabel") if is_binary else ("numbers to predict", "regression")
        return f"If each row has several {kind}, pass task={task!r}."
    if output.ndim > 2 and output.movedim(-1, 1).shape[2:] == y.shape[1:]:
        return f"Move the axis of the outputs with forward=lambda module, X: {call}.movedim(-1, 1)."
    return "Pass a function that returns outputs of this shape: forward=lambda module, X: ..."
