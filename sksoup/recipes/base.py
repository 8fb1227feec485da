"""What all soups share: the two forms of fit, validation, prediction, saving, tags."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import multiprocessing
import os
import platform
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, metadata, version
from numbers import Integral
from pathlib import Path
from types import FrameType
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.callback import CallbackSupportMixin, with_callbacks
from sklearn.metrics import accuracy_score, check_scoring, r2_score
from sklearn.utils import (
    ClassifierTags,
    RegressorTags,
    Tags,
    check_array,
    check_scalar,
    check_X_y,
)
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    validate_data,
)
from skorch import NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.describe import judge
from ..checkpoints.hub import copy_companions, hub_folder
from ..checkpoints.read import new_folder, write_text
from ..data.loaders import (
    as_batches,
    from_lists,
    is_apart,
    is_loader,
    minibatches,
    read_loader,
    targets_of,
)
from ..data.rows import (
    IGNORED,
    TASKS,
    HeldOut,
    Task,
    encode_targets,
    fits,
    is_dense,
    is_multiple,
    map_inputs,
    n_rows,
    parts_of,
    resolve_classes,
    resolve_device,
    take,
    to_inputs,
    to_tensor,
)
from ..displays.report import render
from ..engine.batch_norm import (
    POLICIES,
    BatchNormPolicy,
    can_recalibrate,
    recalibrate,
    statistics,
)
from ..engine.objective import (
    Forward,
    Objective,
    batched,
    feed,
    ignored_label,
    load_weights,
    module_dtype,
    prepare_module,
)
from ..engine.problem import Found, Problem, Step, Weights
from ..engine.scores import Evaluator, RowScore
from ..exceptions import CheckpointError, SoupWarning
from ..mixing.layers import group_layers, is_variance
from ..mixing.mix import cast, mix, stored_dtypes
from ..mixing.recipe import Recipe
from ..runtime.cache import Memo, encode_module, open_memory
from ..runtime.distributed import rank

DEFAULT_SCORING = {"classification": "accuracy", "multilabel": "accuracy", "regression": "r2"}
INSIDE = {"sksoup", "sklearn", "joblib", "contextlib", "torch"}  # not who called fit
NOT_IN_RECIPES = ("checkpoints", "memory")  # parameters that change no result
PACKAGES = ("sksoup", "torch", "numpy", "scikit-learn", "safetensors")
INTEGERS = [np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]


def two_forms(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``fit`` be called with or without checkpoints; scikit-learn sees the second form."""

    @functools.wraps(fit)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "checkpoints" in kwargs:
            return fit(self, kwargs.pop("checkpoints"), *args, **kwargs)
        n_data = 0 if "X" in kwargs else 1 if "y" in kwargs else 2  # positions left for X and y
        if len(args) > n_data or (args and isinstance(args[0], CheckpointCollection)):
            return fit(self, *args, **kwargs)
        return fit(self, self.checkpoints, *args, **kwargs)

    signature = inspect.signature(fit)
    seen = [p for name, p in signature.parameters.items() if name != "checkpoints"]
    wrapper.__signature__ = signature.replace(parameters=seen)  # type: ignore[attr-defined]
    return wrapper


@contextmanager
def hashed_meanwhile(checkpoints: CheckpointCollection) -> Iterator[None]:
    """Hash the files beside the search; not any longer when it fails."""
    checkpoints.start_hashing()
    try:
        yield
    except BaseException:
        checkpoints.stop_hashing()
        raise


@contextmanager
def threads_of_parent(checkpoints: Any) -> Iterator[None]:
    """In a worker process, compute with the threads of the process that sent the collection.

    joblib gives its workers fewer, which would change the last bits of sums. (Soups are cloned on
    the way, collections are not.)
    """
    n, wanted = torch.get_num_threads(), getattr(checkpoints, "n_threads_of_parent", None)
    if wanted is None or multiprocessing.parent_process() is None:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(n)


def _package(frame: FrameType) -> str:
    """The top package of the code that runs in a frame."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


class DocLinkMixin:
    """Where scikit-learn's HTML display links to: the documentation the package's metadata names.

    No link where it names none.
    """

    _doc_link_module = "sksoup"

    @property
    def _doc_link_template(self) -> str:
        urls = dict(
            entry.split(", ", 1) for entry in metadata("sksoup").get_all("Project-URL") or ()
        )
        base: str | None = urls.get("Documentation")
        return "" if base is None else f"{base.rstrip('/')}/generated/{{name}}.html"

    def _doc_link_url_param_generator(self) -> dict[str, str]:
        name = type(self).__name__
        is_short = name in vars(importlib.import_module("sksoup"))
        public = ".".join(type(self).__module__.split(".")[:2])  # sksoup.model_selection
        return {"name": f"sksoup.{name}" if is_short else f"{public}.{name}"}


class BaseSoup(DocLinkMixin, CallbackSupportMixin, BaseEstimator):  # type: ignore[misc]
    """Base of all soups: everything but the search for coefficients.

    A recipe is a subclass with its parameters in ``__init__`` and one method, ``_search``, that
    gets a `Problem` and returns `Found` coefficients.
    """

    checkpoints: Any
    batch_norm: BatchNormPolicy = "average"
    _has_recipe = True  # an ensemble mixes nothing
    forward: Forward | None = None
    task: Task
    classes: ArrayLike | None
    batch_size: int | None
    device: str | torch.device

    # ------------------------------------------------------------------ fit

    @overload
    def fit(
        self, checkpoints: Any, X: Any, y: Any = None, *, sample_weight: Any = None
    ) -> Self: ...

    @overload
    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None) -> Self: ...

    @two_forms
    @with_callbacks  # type: ignore[untyped-decorator]
    def fit(self, checkpoints: Any, X: Any, y: Any = None, *, sample_weight: Any = None) -> Self:
        """Find the coefficients on held-out data and mix the soup.

        Called as ``fit(checkpoints, X, y)``, or as ``fit(X, y)`` when the checkpoints were given
        to the constructor.

        Parameters
        ----------
        checkpoints : CheckpointCollection, callable or iterable
            What to mix; a callable ``(X, y) -> CheckpointCollection`` makes it from the data, and
            is given ``sample_weight`` too if it has a parameter of that name. By default the
            constructor's ``checkpoints``.
        X : array-like or Tensor of shape (n_samples, ...), dict or tuple of them, Dataset or \
                DataLoader
            Held-out inputs; a dict is fed by name, a tuple by position. Floating ones are converted
            to the module's dtype. A torch ``Dataset``, a ``DataLoader``, a ``datasets.Dataset`` or
            an iterator of batches is walked once and kept in memory.
        y : array-like or Tensor of shape (n_samples,) or (n_samples, n_outputs), default=None
            Held-out labels or targets; integer labels of shape (n_samples, ...) where the module
            gives (n_samples, n_outputs, ...), of pixels or tokens, -100 at positions that are left
            out. None where the batches hold them: the second of a pair, or
            ``labels`` of a mapping; a string names another key.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows, in the loss and in the held-out score.

        Returns
        -------
        self : estimator
            Fitted.

        Raises
        ------
        CheckpointError
            The checkpoints can't be opened, do not fit each other or the module, or hold NaN.
        ValueError
            X, y and parameters that do not fit each other.
        DivergenceError
            The loss or the coefficients stopped being finite.
        """
        self._forget()
        try:
            with threads_of_parent(checkpoints):
                self._fit(checkpoints, X, y, sample_weight)
        except BaseException:
            self._forget()
            raise
        return self

    def _fit(self, checkpoints: Any, X: Any, y: Any, sample_weight: Any) -> None:
        self.warnings_: tuple[str, ...] = ()
        self._check_params()
        ordered = is_apart(y) or is_apart(sample_weight)
        X, y = validate_rows(self, X, y, self.task, ordered)
        weight = _check_weight(sample_weight, len(y))
        collection = self._collect(checkpoints, X, y, weight)
        device = resolve_device(self.device)
        module = prepare_module(collection.build_module(), collection, device)
        data = self._held_out(module, X, y, weight, device)
        self._check_batch_norm(module, data)
        layers = group_layers(module, collection.layout, getattr(self, "layerwise", False))
        objective = Objective(
            module,
            getattr(self, "criterion", None),
            self.task,
            getattr(self, "precision", "fp32"),
            getattr(self, "compile", False),
            self.forward,
            self.one_logit_,
        )
        memo = Memo(open_memory(getattr(self, "memory", None)))
        if memo:
            memo = memo.within(data.X, data.y, weight, y, *self._what_predicts(module))
        metadata = {} if weight is None else {"sample_weight": weight}
        shown = {"X": X, "y": y, "metadata": metadata}  # to callbacks
        problem = Problem(
            collection,
            layers,
            data,
            objective,
            self._evaluator(objective, data, X, y, weight, memo),
            functools.partial(self._progress, module, shown),
            memo,
        )
        with hashed_meanwhile(collection) if self._has_recipe else nullcontext():
            self._finish(problem, self._search(problem))

    def _forget(self) -> None:
        """Be unfitted, so that a fit that fails leaves no mixture of two."""
        for name in [name for name in vars(self) if name.endswith("_") and name[0] != "_"]:
            delattr(self, name)

    def _what_predicts(self, module: nn.Module) -> tuple[Any, ...]:
        """All that outputs for the rows depend on, beside weights."""
        return (
            list(encode_module(module)), self.forward, self.task, self.one_logit_,
            getattr(self, "classes_", None), self.batch_size, getattr(self, "precision", "fp32"),
        )  # fmt: skip

    @abstractmethod
    def _search(self, problem: Problem) -> Found:
        """Find the coefficients: the one method a recipe has to have."""

    def _finish(self, problem: Problem, found: Found) -> None:
        """Mix the soup from the coefficients alone and keep what was found."""
        layers = problem.layers
        coef = layers.expand(found.coef)
        self.coef_ = coef if getattr(self, "layerwise", False) else coef[0]
        self.layers_ = dict(layers.rows)
        self.ingredients_ = _mixed(problem.checkpoints, coef)
        self.layer_names_ = layers.names
        self.checkpoints_ = problem.checkpoints
        self.history_ = found.history
        self.counts_ = problem.objective.counts
        for name, value in found.attributes.items():
            setattr(self, name, value)
        self._keep_soup(problem, coef)

    def _keep_soup(self, problem: Problem, coef: NDArray[np.float64]) -> None:
        collection, module = problem.checkpoints, problem.module
        load_weights(module, mix(collection, coef, layers=problem.layers.rows))
        mixed = _mixed(collection, coef)
        self._warn_of_strangers(collection, mixed)
        self.recalibrated_ = self._settle_batch_norm(problem) if len(mixed) > 1 else ()
        self._warn_of_variances(problem, coef)
        self._dtypes = stored_dtypes(collection, coef)
        self.module_ = module
        self.recipe_ = Recipe.record(
            type(self).__name__,
            collection,
            coef,
            layers=self.layers_,
            layer_names=self.layer_names_,
            params=_as_json(
                {k: v for k, v in self.get_params(False).items() if k not in NOT_IN_RECIPES}
            ),
            scores=_as_json(getattr(self, "individual_scores_", {})),
            temperature=float(getattr(self, "temperature_", 1.0)),
            recalibrated=self.recalibrated_,
            versions=dict(_versions()),
            classes=_labels(getattr(self, "classes_", ())),
        )

    def _warn(self, message: str) -> None:
        """Warn whoever called from outside, and keep what was said in ``warnings_``."""
        self.warnings_ = (*self.warnings_, message)
        frame, level = inspect.currentframe(), 1
        while frame and frame.f_back and _package(frame) in INSIDE:
            frame, level = frame.f_back, level + 1
        warnings.warn(message, SoupWarning, stacklevel=level)

    def _warn_of_strangers(self, collection: CheckpointCollection, names: Sequence[str]) -> None:
        """Say which of these do not belong, of those that were read; once in a fit."""
        strangers = collection.strangers(names)
        if strangers and not any("share a start" in said for said in self.warnings_):
            said = judge(strangers, len(names))
            self._warn(f"{said} collection.describe() tells more.")

    def _warn_of_variances(self, problem: Problem, coef: NDArray[np.float64]) -> None:
        """Say where extrapolation left a running variance at 0, which ruins the outputs."""
        rows = problem.layers.rows
        clamped = {
            name: int((value <= 0).sum())
            for name, value in problem.module.state_dict().items()
            if is_variance(name) and name not in self.recalibrated_ and coef[rows[name]].min() < 0
        }
        clamped = {name: n for name, n in clamped.items() if n}
        if clamped:
            name, n = next(iter(clamped.items()))
            more = f", and others in {len(clamped) - 1} more layers" if len(clamped) > 1 else ""
            self._warn(
                f"Under these coefficients {n} of BatchNorm's variances in {name!r} would be "
                f"negative{more}; they are 0 in the soup, which can make its outputs huge. "
                f"batch_norm='recalibrate' measures them anew."
            )

    def _check_batch_norm(self, module: nn.Module, data: HeldOut) -> None:
        if self.batch_norm != "recalibrate" or not statistics(module):
            return
        if not can_recalibrate(len(data), self.batch_size):
            raise ValueError(
                f"batch_norm='recalibrate' measures the variance of minibatches, and those of "
                f"{len(data)} rows with batch_size={self.batch_size} have one row each. Give more "
                f"rows, a larger batch_size, or batch_norm='average'."
            )

    def _settle_batch_norm(self, problem: Problem) -> tuple[str, ...]:
        """Re-estimate BatchNorm's statistics as ``batch_norm`` says; tell which tensors were."""
        module, names = problem.module, statistics(problem.module)
        if self.batch_norm == "average" or not names:
            return ()
        if not can_recalibrate(len(problem.data), self.batch_size):
            return ()  # "auto": for "recalibrate" it was refused
        state = module.state_dict()
        averages = {name: state[name].clone() for name in names}

        def settle() -> dict[str, torch.Tensor]:
            score = problem.evaluate().score if self.batch_norm == "auto" else -math.inf
            recalibrate(problem.objective, problem.data, self.batch_size)
            is_worse = self.batch_norm == "auto" and problem.evaluate().score <= score
            return {} if is_worse else {name: module.state_dict()[name].clone() for name in names}

        memo = problem.evaluate.memo.within(self.batch_norm, dict(state))  # before it is changed
        found = memo(("batch_norm",), settle)
        load_weights(module, averages | found)
        return names if found else ()

    # ------------------------------------------------------------- validation

    def _check_params(self) -> None:
        """Check the parameters all recipes share; recipes add theirs."""
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}.")
        if self.batch_size is not None:
            check_scalar(self.batch_size, "batch_size", Integral, min_val=1)
        if self.batch_norm not in POLICIES:
            raise ValueError(
                f"batch_norm must be one of {', '.join(POLICIES)}, got {self.batch_norm!r}."
            )
        if self.forward is not None and not callable(self.forward):
            raise TypeError(
                f"forward must be a callable (module, X) or None, got {self.forward!r}."
            )
        open_memory(getattr(self, "memory", None))

    def _collect(self, checkpoints: Any, X: Any, y: Any, weight: Any) -> CheckpointCollection:
        if checkpoints is None:
            raise ValueError(
                f"{type(self).__name__} has no checkpoints: give them to the constructor, "
                f"{type(self).__name__}(checkpoints).fit(X, y), or to fit(checkpoints, X, y)."
            )
        if isinstance(checkpoints, CheckpointCollection):
            return checkpoints
        if callable(checkpoints) and not isinstance(checkpoints, nn.Module):
            takes_weight = "sample_weight" in inspect.signature(checkpoints).parameters
            made = checkpoints(X, y, **({"sample_weight": weight} if takes_weight else {}))
            if not isinstance(made, CheckpointCollection):
                raise TypeError(
                    f"checkpoints={checkpoints!r} returned a {type(made).__name__}, expected a "
                    f"CheckpointCollection."
                )
            return made
        return CheckpointCollection(checkpoints)

    def _held_out(
        self,
        module: nn.Module,
        X: Any,
        y: NDArray[Any],
        weight: NDArray[np.float64] | None,
        device: torch.device,
    ) -> HeldOut:
        """Put the data on the device; one row through the module tells the shape of its output."""
        dtype, cpu = module_dtype(module), torch.device("cpu")
        row = to_inputs(take(map_inputs(to_tensor, X), slice(1)), dtype, device)
        output = _probe(module, row, self.forward)
        dense = self.task == "classification" and is_dense(y)
        self.one_logit_ = (
            self.task == "classification" and not dense and output.shape in ((1,), (1, 1))
        )
        if self.one_logit_:
            if len(labels := np.unique(y)) > 2:
                raise ValueError(
                    f"The module's output has shape {tuple(output.shape)} for one row: one logit, "
                    f"which tells two labels apart, but y has {len(labels)}. Expected "
                    f"(1, n_outputs)."
                )
            output = output.new_zeros((1, 2))  # as which it is used
        if dense and (output.ndim < 3 or output.shape[2:] != y.shape[1:]):
            raise ValueError(
                f"The module's output has shape {tuple(output.shape)} for one row, and y has "
                f"labels of shape {y.shape[1:]}: expected (1, n_outputs, "
                f"{', '.join(map(str, y.shape[1:]))}). Move the axis of the outputs with "
                f"forward=lambda module, X: module(X).movedim(-1, 1)."
            )
        if not dense and (output.ndim > 2 or (self.task == "classification" and output.ndim != 2)):
            raise ValueError(
                f"The module's output has shape {tuple(output.shape)} for one row, expected "
                f"(1, n_outputs) for task={self.task!r}."
            )
        n_outputs = output.shape[1] if output.ndim > 1 else 1
        if self.task == "classification":
            self.classes_ = resolve_classes(
                y[y != IGNORED] if dense else y, n_outputs, self.classes
            )
        ignored = ignored_label(getattr(self, "criterion", None))
        targets = encode_targets(
            y, self.task, getattr(self, "classes_", None), n_outputs, dtype, device, ignored
        )
        counted = None
        if self.task == "classification" and bool((targets == ignored).any()):
            counted = (targets != ignored).reshape(len(targets), -1).sum(dim=1)
        if self.task != "classification":
            targets = targets.reshape(len(targets), *output.shape[1:])
            self.target_ndim_ = y.ndim
        self.n_outputs_ = n_outputs
        weights = None if weight is None else to_tensor(weight).to(device, dtype)
        is_streamed = not fits(map_inputs(to_tensor, X), device)
        inputs = to_inputs(X, dtype, cpu if is_streamed else device)
        data = HeldOut(inputs, targets, weights, is_streamed, counted)
        if data.amounts is not None and not bool(data.amounts.any()):
            raise ValueError("sample_weight is 0 for all rows that have a label.")
        return data

    # ------------------------------------------------------------------ scores

    def _evaluator(
        self, objective: Objective, data: HeldOut, X: Any, y: Any, weight: Any, memo: Memo
    ) -> Evaluator:
        """What scores the module's present weights on the held-out rows."""
        scoring = getattr(self, "scoring", None)
        # a fitted soup for scikit-learn's scorers to look at, without checkpoints and callbacks
        soup = copy.copy(self)
        for name in [name for name in vars(self) if "callback" in name]:
            delattr(soup, name)
        soup.checkpoints, soup.module_, soup.coef_ = None, objective.module, None
        rows = None
        if scoring in (None, DEFAULT_SCORING[self.task]):
            scorer = None
            targets = to_tensor(y) if self.task == "regression" else data.y
            if self.task != "classification" or not is_dense(y):
                rows = RowScore.of(self.task, targets, weight)
        else:
            scorer = check_scoring(soup, scoring)
        memo = memo.within(None if scorer is None else scoring, rows is not None)
        return Evaluator(objective, data, self.batch_size, soup, scorer, X, y, weight, rows, memo)

    def _default_score(self, y: Any, predicted: Any, weight: Any) -> float:
        metric = r2_score if self.task == "regression" else accuracy_score
        if self.task == "classification" and is_dense(np.asarray(y)):
            used = np.asarray(y) != IGNORED  # positions, each with the weight of its row
            if weight is not None:
                weight = np.repeat(np.asarray(weight), used.reshape(len(used), -1).sum(axis=1))
            y, predicted = np.asarray(y)[used], predicted[used]
        return float(metric(y, predicted, sample_weight=weight))

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
        return self._default_score(to_numpy(y), self._decode(outputs), sample_weight)

    # --------------------------------------------------------------- predictions

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
        return self._decode(self._outputs(X))

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
        logits = self._outputs(X) * getattr(self, "temperature_", 1.0)
        p = logits.sigmoid() if self.task == "multilabel" else logits.softmax(dim=1)
        return p.cpu().numpy()

    def _outputs(self, X: Any) -> torch.Tensor:
        """(n_samples, n_outputs) raw outputs of the fitted soup, on the device."""
        return self._outputs_and_targets(X, None, ordered=True)[0]

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
        with threads_of_parent(getattr(self, "checkpoints_", None)):
            return batched(
                lambda rows: feed(
                    module,
                    to_inputs(rows, dtype, device),
                    self.forward,
                    self.one_logit_,
                ),
                map_inputs(to_tensor, X),
                self.batch_size,
            )

    def _decode(self, outputs: torch.Tensor) -> NDArray[Any]:
        """Outputs -> labels or targets."""
        if self.task == "classification":
            return np.asarray(self.classes_[outputs.argmax(dim=1).cpu().numpy()])
        values = outputs.detach().cpu().numpy()
        if self.task == "multilabel":
            return (values > 0).astype(np.int64)
        return (
            values.reshape(len(values))
            if self.target_ndim_ == 1
            else values.reshape(len(values), -1)
        )

    # ------------------------------------------------------------------- weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the soup's weights.

        Returns
        -------
        state_dict : dict of str to Tensor
            Copies on the CPU, in the dtypes of the checkpoints: bit for bit
            ``mix(soup.checkpoints_, soup.coef_, layers=soup.layers_)``, but for ``recalibrated_``.
        """
        check_is_fitted(self, "coef_")
        state = self.module_.state_dict()
        return {
            name: cast(name, state[name].detach().cpu().clone(), dtype)
            for name, dtype in self._dtypes.items()
        }

    def save(self, path: str | os.PathLike[str], card: bool = False) -> None:
        """Write weights and recipe to one ``.safetensors`` file, atomically.

        Parameters
        ----------
        path : str or path-like
            Ends in ``.safetensors``; an existing file is replaced, by the whole new one or not at
            all. ``Recipe.load(path).cook(checkpoints)`` rebuilds the weights. In a distributed job
            rank 0 writes, and the others do not wait.
        card : bool, default=False
            Whether to write a model card beside it, with the suffix ``.md``.

        Raises
        ------
        ValueError
            Another suffix.
        """
        check_is_fitted(self, "coef_")
        if rank():
            return
        self.recipe_.save_weights(Path(path), self.state_dict())
        if card:
            write_text(Path(path).with_suffix(".md"), self.recipe_.to_card())

    def report(self, path: str | os.PathLike[str], comparison: Any = None) -> None:
        """Write one HTML file about the soup, to read in any browser, without a network.

        What was mixed, how well it does, the coefficients, how they were found, what to look at
        and what to do about it.

        Parameters
        ----------
        path : str or path-like
            Ends in ``.html``; an existing file is replaced.
        comparison : SoupComparison or None, default=None
            What `sksoup.inspection.compare_soups` measured, to show the soup beside the others.

        Raises
        ------
        ValueError
            Another suffix.
        ImportError
            matplotlib is not installed.
        """
        check_is_fitted(self, "module_")
        if Path(path).suffix != ".html":
            raise ValueError(f"{os.fspath(path)!r} must end in .html: the report is a web page.")
        if not rank():
            write_text(Path(path), render(self, comparison))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder: weights, recipe, card, and the ingredients' configuration.

        Parameters
        ----------
        folder : str or path-like
            A new folder; it appears once all of it is written. ``from_pretrained`` of transformers
            reads it. ``config.json`` and the tokenizer's files are those of the first checkpoint
            that lies in a folder of Hugging Face.

        Raises
        ------
        CheckpointError
            The ingredients did not come from Hugging Face folders.
        FileExistsError
            The folder is there and not empty.
        """
        check_is_fitted(self, "coef_")
        if rank():
            return
        paths = [self.checkpoints_.path(name) for name in self.checkpoints_]
        sources = [hub_folder(path) for path in paths if path is not None]
        source = next((source for source in sources if source is not None), None)
        if source is None:
            raise CheckpointError(
                f"{os.fspath(folder)!r} can't become a Hugging Face folder: no ingredient lies "
                f"beside a config.json that could be copied. Use save(path)."
            )
        with new_folder(Path(folder)) as temporary:
            copy_companions(source, temporary)
            self.recipe_.save_weights(temporary / "model.safetensors", self.state_dict())
            write_text(temporary / "README.md", self.recipe_.to_card())

    def to_skorch(self, **kwargs: Any) -> Any:
        """Give a skorch net with the soup's weights, initialised: to train on, or to hand over.

        Parameters
        ----------
        **kwargs : dict
            Parameters of the net; by default a criterion that fits ``task`` and the soup's device.

        Returns
        -------
        net : skorch.NeuralNetClassifier, or skorch.NeuralNetRegressor for ``task="regression"``
            Its module is a copy. ``net.partial_fit(X, y)`` trains from these weights; ``fit`` does
            so with ``warm_start=True``.

        Raises
        ------
        ValueError
            ``task="multilabel"``, for which skorch has no net.

        Notes
        -----
        skorch wants labels 0 to n_outputs - 1; its ``predict`` gives them, not ``classes_``.
        """
        check_is_fitted(self, "module_")
        if self.task == "multilabel":
            raise ValueError(
                "skorch has no net for task='multilabel'; give module_ to a skorch.NeuralNet."
            )
        is_regression = self.task == "regression"
        kind = NeuralNetRegressor if is_regression else NeuralNetClassifier
        criterion = nn.MSELoss if is_regression else nn.CrossEntropyLoss
        device = next(self.module_.parameters()).device.type
        module = copy.deepcopy(self.module_).train()
        return kind(module, **{"criterion": criterion, "device": device, **kwargs}).initialize()

    # -------------------------------------------------------------- scikit-learn

    @contextmanager
    def _progress(
        self, module: nn.Module, data: Mapping[str, Any], name: str, n_steps: int
    ) -> Iterator[Step]:
        """Tell scikit-learn's callbacks of each step; the one place that knows their protocol."""
        root = self._init_callback_context(max_subtasks=n_steps)
        root.call_on_fit_task_begin(estimator=self)
        running: list[Any] = []
        remaining = n_steps

        def step(weights: Weights | None = None) -> None:
            """End the running task, if any, and begin the next, if any is left."""
            nonlocal remaining

            def as_if_fitted() -> dict[str, Any]:
                found = None if weights is None else weights()
                soup = copy.deepcopy(module)
                load_weights(soup, found or {})
                return {"module_": soup, "coef_": None}

            if running:
                running.pop().call_on_fit_task_end(
                    estimator=self, reconstruction_attributes=as_if_fitted, **data
                )
            if remaining:
                remaining -= 1
                task = root.subcontext(task_name=name)
                running.append(task.call_on_fit_task_begin(estimator=self))

        step()
        yield step
        root.call_on_fit_task_end(estimator=self)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = self.task != "classification"
        tags.input_tags.three_d_array = True
        if self.task == "regression":
            tags.estimator_type = "regressor"
            tags.regressor_tags = RegressorTags()
        else:
            tags.estimator_type = "classifier"
            tags.classifier_tags = ClassifierTags(multi_label=self.task == "multilabel")
        return tags


FLOATS_AND_INTEGERS = [np.float64, np.float32, *INTEGERS]


def validate_rows(
    estimator: Any, X: Any, y: Any, task: Task, ordered: bool = False
) -> tuple[Any, NDArray[Any]]:
    """Check rows by scikit-learn's rules, note their features; what is on a device stays there."""
    if is_loader(X := as_batches(X, y)):
        X, y = read_loader(X, y, ordered=ordered)
    _refuse_checkpoints(X, y)
    wants = {"multi_output": task != "classification", "y_numeric": task == "regression"}
    y = to_numpy(y)
    estimator.input_names_ = input_names(X)
    if task == "classification" and y is not None and is_dense(np.asarray(y)):
        return validate_dense(estimator, X, np.asarray(y))
    if is_multiple(X):
        X = check_parts(X)
        check_consistent_length(*parts_of(X), y)
        _, y = check_X_y(np.zeros((n_rows(X), 1)), y, **wants)
    elif isinstance(X, torch.Tensor) and X.device.type != "cpu":
        check_consistent_length(X, y)
        estimator.n_features_in_ = X.shape[1]
    else:
        X, y = validate_data(
            estimator, to_numpy(X), y, allow_nd=True, dtype=FLOATS_AND_INTEGERS, **wants
        )
    if task == "classification":
        check_classification_targets(y)
    return X, y


def validate_dense(estimator: Any, X: Any, y: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
    """Check rows with labels at several positions each; scikit-learn knows no such targets."""
    if is_multiple(X):
        X = check_parts(X)
    elif not (isinstance(X, torch.Tensor) and X.device.type != "cpu"):
        X = validate_data(estimator, to_numpy(X), allow_nd=True, dtype=FLOATS_AND_INTEGERS)
    check_consistent_length(*parts_of(X), y)
    if y.dtype.kind not in "iu":
        raise ValueError(
            f"y has shape {y.shape} and dtype {y.dtype}: labels at several positions of a row must "
            f"be integers, {IGNORED} where one is left out."
        )
    if (y == IGNORED).all():
        raise ValueError(f"y holds nothing but {IGNORED}, which leaves out every position.")
    return X, y


def validate_inputs(estimator: Any, X: Any) -> Any:
    """Check rows to predict for: the same inputs as in `fit`."""
    if (got := input_names(X)) != (expected := estimator.input_names_):
        raise ValueError(
            f"X has other inputs than in fit: got {_named(got)}, expected {_named(expected)}."
        )
    if is_multiple(X):
        return check_parts(X)
    if isinstance(X, torch.Tensor) and X.device.type != "cpu":
        return X
    return validate_data(
        estimator, to_numpy(X), reset=False, allow_nd=True, dtype=FLOATS_AND_INTEGERS
    )


def input_names(X: Any) -> tuple[str, ...] | int | None:
    """The names of several inputs, or their number; None for one input."""
    if not is_multiple(X):
        return None
    return tuple(X) if isinstance(X, Mapping) else len(X)


def _named(names: tuple[str, ...] | int | None) -> str:
    if isinstance(names, tuple):
        return f"a mapping with {', '.join(map(repr, names))}"
    return "one array" if names is None else f"a tuple of {names} arrays"


def check_parts(X: Any) -> Any:
    """Check several inputs: as many rows in each, finite numbers."""

    def check(part: Any) -> Any:
        if isinstance(part, torch.Tensor) and part.device.type != "cpu":
            return part
        part = from_lists(part) if isinstance(part, (list, tuple)) else to_numpy(part)
        return check_array(part, ensure_2d=False, allow_nd=True, dtype=FLOATS_AND_INTEGERS)

    X = map_inputs(check, X)
    check_consistent_length(*parts_of(X))
    return X


def _probe(module: nn.Module, row: Any, forward: Any) -> torch.Tensor:
    """Output for one row; says what was fed when the module can't take it."""
    try:
        with torch.no_grad():
            return feed(module, row, forward)
    except (RuntimeError, IndexError, TypeError) as error:  # what torch raises on what does not fit
        if isinstance(error, TypeError) and "module returned" in str(error):
            raise
        fed = map_inputs(lambda part: f"shape {tuple(part.shape)} and dtype {part.dtype}", row)
        fed = ", ".join(f"{k}: {v}" for k, v in fed.items()) if isinstance(fed, dict) else fed
        raise ValueError(
            f"The module can't take X: fed one row of {fed}, it raised {type(error).__name__}: "
            f"{error}. Floating inputs are fed as the module's dtype, integers as they are, a "
            f"mapping by name and a tuple by position."
        ) from error


def _or_texts(item: Any) -> str:
    return ", or texts, which have to be tokenised first" if isinstance(item, str) else ""


def _refuse_checkpoints(X: Any, y: Any) -> None:
    """Say what went wrong when checkpoints stand where X should."""
    if is_multiple(X) and y is not None:
        lengths = {len(part) if getattr(part, "ndim", 1) else 0 for part in parts_of(X)}
        if lengths == {len(y)}:
            return
    items = list(X[:1]) if isinstance(X, (list, tuple)) else [X]
    for item in items:
        is_state = isinstance(item, Mapping) and any(
            isinstance(value, torch.Tensor) for value in item.values()
        )
        if isinstance(item, (str, os.PathLike, nn.Module)) or is_state:
            raise TypeError(
                f"X holds {'a state dict' if is_state else type(item).__name__} where rows of "
                f"data were expected: these look like checkpoints{_or_texts(item)}. Call "
                f"fit(checkpoints, X, y), or "
                f"wrap them: fit(CheckpointCollection(checkpoints, module=...), X)."
            )


def to_numpy(values: Any) -> Any:
    """A tensor as an array, from any device; anything else as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    values = values.float() if values.dtype == torch.bfloat16 else values  # which numpy lacks
    return values.detach().cpu().numpy()


def _check_weight(sample_weight: Any, n_samples: int) -> NDArray[np.float64] | None:
    if sample_weight is None:
        return None
    weight = np.asarray(to_numpy(sample_weight), dtype=np.float64)
    if weight.shape != (n_samples,):
        raise ValueError(
            f"sample_weight has shape {weight.shape}, expected ({n_samples},), one per row of X."
        )
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise ValueError("sample_weight must be finite, not negative, and not zero everywhere.")
    return weight


@functools.cache
def _versions() -> Mapping[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # run from a folder that was never installed
            versions[package] = version(package)
    return versions


def _mixed(collection: CheckpointCollection, coef: NDArray[np.float64]) -> tuple[str, ...]:
    """Checkpoints with a coefficient other than 0 in any layer."""
    return tuple(name for name, c in zip(collection, coef.T, strict=True) if c.any())


def _labels(classes: Any) -> tuple[Any, ...]:
    """Labels of the outputs, where JSON can hold them."""
    labels = np.asarray(classes).tolist()
    return tuple(labels) if all(isinstance(c, (bool, int, float, str)) for c in labels) else ()


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON can hold them; anything else by its repr."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, np.generic):
            value = value.item()
        simple = value is None or isinstance(value, (bool, int, float, str))
        plain[name] = value if simple else repr(value)
    return plain
