"""Validation of the user's input, by scikit-learn's rules, before any work is done."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import check_scoring, get_scorer
from sklearn.utils import check_array, check_scalar, check_X_y
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, validate_data
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.arrays import map_inputs, n_rows, parts_of
from ..data.indexed import IndexedRows
from ..data.labels import ignore_index_of, is_dense
from ..data.loaders import MASK, Padded, Pads, as_batches, from_lists, is_apart, read_loader
from ..data.outputs import Outputs, Task
from ..data.rows import HeldOut, fits, is_loader, is_multiple, resolve_device, to_inputs, to_tensor
from ..data.tokens import (
    IGNORED,
    TEXT_TASKS,
    kind_of_model,
    targets_from,
    with_decoder_inputs,
    without_ignored,
)
from ..engine.batch_norm import statistics
from ..engine.deltas import resolve_delta_dtype
from ..engine.descent import OPTIMIZERS, SCHEDULES, DeltaStorage, Settings
from ..engine.merging import PLAIN, SWITCHES, refuse_merging
from ..engine.objective import (
    Criterion,
    Forward,
    Objective,
    as_code,
    as_rows,
    called,
    module_dtype,
    prepare_module,
)
from ..engine.precision import autocast_dtype
from ..engine.probabilities import Watch, check_log_probabilities, judge_outputs
from ..engine.problem import Problem, Step
from ..engine.scores import Evaluator
from ..engine.tied import check_tied, refuse_shared_memory
from ..mixing.layers import Layerwise, group_layers
from ..runtime.cache import Cache
from ..runtime.distributed import LOST, agreed, refuse_differing, world_size
from ..runtime.fingerprint import encode_module, fingerprint
from ..runtime.memory import parse_bytes
from ..runtime.shards import build_sharded, rows_of, sharded_parts
from .misplaced import refuse_checkpoints, refuse_order

DEFAULT_SCORING = {
    "classification": "accuracy", "multilabel": "accuracy", "regression": "r2",
    "language-modeling": "neg_log_loss",
}  # fmt: skip
SCORER = type(get_scorer("accuracy"))  # what make_scorer returns
DECAY_ROWS = 1000  # weight_decay="auto" is this / N: 1 for 1000 held-out rows

INTEGERS = [np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
FLOATS_AND_INTEGERS = [np.float64, np.float32, *INTEGERS]


def validate_rows(
    estimator: Any, X: Any, y: Any, task: Task, sample_weight: Any = None
) -> tuple[Any, NDArray[Any], NDArray[np.float64] | None]:
    """Check rows, targets and weights; set the features; tensors stay on their device."""
    refuse_order(y)
    estimator._target_key = y if isinstance(y, str) else None
    if isinstance(X, Mapping):
        X = as_batches(X, y)
    if is_loader(X):
        ordered = is_apart(y) or is_apart(sample_weight)
        pads: Pads | None = "causal" if task == "causal-lm" else "any"
        X, y = read_loader(
            X, y, ordered=ordered, pads=pads if task in TEXT_TASKS else None,
            keep=memory_limit_of(estimator),
        )  # fmt: skip
    if task in TEXT_TASKS and y is None:
        y = targets_from(X)
    refuse_checkpoints(X, y)
    wants = {"multi_output": task != "classification", "y_numeric": task == "regression"}
    y = to_numpy(y)
    estimator.input_names_ = input_names(X)
    if task in ("regression", "multilabel"):
        _check_flat(y, task, estimator.input_names_)
    if isinstance(X, IndexedRows):
        return _validate_indexed(estimator, X, y, task, sample_weight, wants)
    if task in TEXT_TASKS:
        X, y = check_inputs(X), _check_dense(np.asarray(y))
        check_consistent_length(*parts_of(X), y)
        return X, y, _check_weight(sample_weight, y)
    if task == "classification" and y is not None and is_dense(np.asarray(y)):
        X, y = validate_inputs(estimator, X, reset=True), _check_positions(np.asarray(y))
        check_consistent_length(*parts_of(X), y)
        return X, y, _check_weight(sample_weight, y)
    if is_multiple(X):
        X = check_inputs(X)
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
    if task == "regression" and y.dtype.kind not in "biuf":
        raise ValueError(
            f"y holds {y.flat[0]!r} (dtype {y.dtype}), expected numbers for task='regression'. "
            f"Convert it with y.astype(float), or use task='classification' for labels."
        )
    return X, y, None if sample_weight is None else _check_weight(sample_weight, y)


def _validate_indexed(
    estimator: Any, X: IndexedRows, y: Any, task: Task, sample_weight: Any, wants: dict[str, bool]
) -> tuple[IndexedRows, NDArray[Any], NDArray[np.float64] | None]:
    """Check targets of rows that are not in memory; the rows themselves were checked on reading."""
    first = X.take(torch.zeros(1, dtype=torch.long))
    if isinstance(first, torch.Tensor):
        first = validate_inputs(estimator, first, reset=True)
    if task == "classification" and y is not None and is_dense(np.asarray(y)):
        y = _check_positions(np.asarray(y))
        check_consistent_length(X, y)
    else:
        check_consistent_length(X, y)
        _, y = check_X_y(np.zeros((len(X), 1)), y, **wants)
        if task == "classification":
            check_classification_targets(y)
    return X, y, _check_weight(sample_weight, y)


def _check_positions(y: NDArray[Any]) -> NDArray[Any]:
    """Check labels of pixels or tokens; masks of booleans or of whole numbers become integers."""
    if y.dtype.kind == "b" or (
        y.dtype.kind == "f" and bool(np.isfinite(y).all() and (y == np.floor(y)).all())
    ):
        y = y.astype(np.int64)
    return _check_dense(y, " For several numbers to predict per row pass task='regression'.")


def _check_flat(y: Any, task: Task, names: tuple[str, ...] | int | None) -> None:
    """Refuse targets of a regression or several labels that have more than two dimensions."""
    if getattr(y, "ndim", 0) > 2:
        call = {int: "module(*X)", tuple: "module(**X)"}.get(type(names), "module(X)")
        masks = "For one label per pixel use task='classification'; otherwise flatten"
        raise ValueError(
            f"y has shape {y.shape}, expected (n_samples,) or (n_samples, n_outputs) for "
            f"task={task!r}. {'Flatten' if task == 'regression' else masks} y with "
            f"y.reshape(len(y), -1), and the outputs with forward=lambda module, X: "
            f"{call}.flatten(1)."
        )


def _check_dense(y: NDArray[Any], remedy: str = "") -> NDArray[Any]:
    """Check labels at several positions of a row; scikit-learn has no check for them."""
    if y.ndim < 2 or y.dtype.kind not in "iu":
        raise ValueError(
            f"y has shape {y.shape} and dtype {y.dtype}, expected integers for labels at several "
            f"positions of a row, with {IGNORED} at positions to ignore.{remedy}"
        )
    return y


def validate_inputs(estimator: Any, X: Any, reset: bool = False) -> Any:
    """Check inputs: the same ones as in `fit`; with ``reset``, set their features.

    Targets under the key that was named in `fit` are dropped.
    """
    if isinstance(X, Mapping) and getattr(estimator, "_target_key", None) in X:
        X = {name: part for name, part in X.items() if name != estimator._target_key}
    got, expected = input_names(X), estimator.input_names_
    is_text = getattr(estimator, "task", None) in TEXT_TASKS  # a search has no task
    if isinstance(got, tuple) and isinstance(expected, tuple) and is_text:
        # batches that are padded have a mask, even if those in fit did not
        got = tuple(name for name in got if name != MASK or MASK in expected)
    if isinstance(got, tuple) and isinstance(expected, tuple):  # passed by name, in any order
        is_same = sorted(got) == sorted(expected)
    else:
        is_same = got == expected
    if not is_same:
        raise ValueError(
            f"X has different inputs than in fit: got {_named(got)}, expected {_named(expected)}."
        )
    if isinstance(X, IndexedRows):  # checked when they were read
        return X
    if is_multiple(X) or is_text:  # texts may be longer or shorter than in fit
        return check_inputs(X)
    if isinstance(X, torch.Tensor) and X.device.type != "cpu":
        return X
    return validate_data(
        estimator, to_numpy(X), reset=reset, allow_nd=True, dtype=FLOATS_AND_INTEGERS
    )


def input_names(X: Any) -> tuple[str, ...] | int | None:
    """The names of several inputs, or their number; None for one input."""
    if isinstance(X, IndexedRows):
        X = X.take(torch.zeros(1, dtype=torch.long))
    if not is_multiple(X):
        return None
    if isinstance(X, Padded):
        return tuple(name for name in X if name != MASK)
    return tuple(X) if isinstance(X, Mapping) else len(X)


def _named(names: tuple[str, ...] | int | None) -> str:
    if isinstance(names, tuple):
        return f"a mapping with {', '.join(map(repr, names))}"
    return "one array" if names is None else f"a tuple of {names} arrays"


def check_inputs(X: Any) -> Any:
    """Check each of several inputs: the same number of rows, finite numbers."""

    def check(part: Any) -> Any:
        if isinstance(part, torch.Tensor) and part.device.type != "cpu":
            return part
        part = from_lists(part) if isinstance(part, (list, tuple)) else to_numpy(part)
        return check_array(part, ensure_2d=False, allow_nd=True, dtype=FLOATS_AND_INTEGERS)

    X = map_inputs(check, X)
    check_consistent_length(*parts_of(X))
    return X


def to_numpy(values: Any) -> Any:
    """A tensor on any device as an array; anything else unchanged."""
    if not isinstance(values, torch.Tensor):
        return values
    values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has no bfloat16
    return values.detach().cpu().numpy()


def _check_weight(sample_weight: Any, y: Any) -> NDArray[np.float64] | None:
    if sample_weight is None:
        return None
    weight = np.asarray(to_numpy(sample_weight), dtype=np.float64)
    if weight.shape != (len(y),):
        raise ValueError(
            f"sample_weight has shape {weight.shape}, expected ({len(y)},): one weight per row of "
            f"X."
        )
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise ValueError("sample_weight must be finite, not negative, and not zero everywhere.")
    exponent = int(np.frexp(weight.max())[1])
    if abs(exponent) < 20:
        return weight
    # only ratios count; a power of 2 changes no bit of them, and sums neither vanish nor overflow
    return np.asarray(np.ldexp(weight, -exponent), dtype=np.float64)


def check_choice(value: Any, name: str, choices: tuple[Any, ...]) -> None:
    """Raise an error if a parameter has none of the allowed values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_flag(value: Any, name: str) -> None:
    """Raise an error unless a value is True or False: a string, even "no", would be true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_fraction(fraction: float | None, name: str) -> None:
    """Check a fraction of the rows, unless it is None."""
    if fraction is not None:
        check_scalar(fraction, name, float, min_val=0, max_val=1, include_boundaries="neither")


def check_finite(number: float, name: str) -> None:
    """Check that a parameter is a finite number."""
    check_scalar(number, name, Real)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number!r}.")


def check_ranks(
    collection: CheckpointCollection, X: Any, y: Any, weight: NDArray[np.float64] | None
) -> None:
    """Raise an error on every rank if they do not fit the same checkpoints on the same rows.

    Checkpoints are compared by their names and shapes, rows by their number, labels and weights.
    """
    is_object = isinstance(y, np.ndarray) and y.dtype.hasobject
    refuse_differing(
        {
            "checkpoints": collection.names,
            "tensors": fingerprint(repr(collection.layout)),
            "numbers of rows": n_rows(X),
            "labels or weights": fingerprint(y.tolist() if is_object else y, weight),
        }
    )


def collect(
    checkpoints: Any, X: Any, y: Any, weight: NDArray[np.float64] | None, who: str
) -> CheckpointCollection:
    """The collection passed to ``fit``, or made from what was passed."""
    if checkpoints is None:
        raise ValueError(
            f"{who} has no checkpoints. Pass them to the constructor, {who}(checkpoints).fit(X, "
            f"y), or to fit(checkpoints, X, y)."
        )
    if isinstance(checkpoints, CheckpointCollection):
        return checkpoints
    if not callable(checkpoints) or isinstance(checkpoints, nn.Module):
        return CheckpointCollection(checkpoints)
    if isinstance(X, IndexedRows):
        raise ValueError(
            f"checkpoints={checkpoints!r} needs the held-out rows in memory, but only {X.n_kept:,} "
            f"of {len(X):,} fit. Pass fewer rows, raise memory_limit if it is set, or pass "
            f"checkpoints that are already trained."
        )
    takes_weight = "sample_weight" in inspect.signature(checkpoints).parameters
    made = checkpoints(X, y, **({"sample_weight": weight} if takes_weight else {}))
    if not isinstance(made, CheckpointCollection):
        raise TypeError(
            f"checkpoints={checkpoints!r} returned a {type(made).__name__}, expected a "
            f"CheckpointCollection."
        )
    return made


def prepare_problem(
    checkpoints: CheckpointCollection,
    X: Any,
    y: NDArray[Any],
    weight: NDArray[np.float64] | None = None,
    *,
    task: Task,
    classes: ArrayLike | None = None,
    criterion: Criterion | None = None,
    forward: Forward | None = None,
    layerwise: Layerwise = False,
    batch_size: int | None = 128,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    compile: bool = False,
    shard: str | None = None,
    cache: Cache | None = None,
    progress: Callable[[nn.Module, str, int], AbstractContextManager[Step]] | None = None,
) -> Problem:
    """Make the problem that a search solves from rows checked by `validate_rows`."""
    where = resolve_device(device)
    build = checkpoints.build_module
    built = build() if shard is None else build_sharded(build, where)
    module = prepare_module(built, checkpoints, where)
    if sharded_parts(module):
        checkpoints = checkpoints.slice_rows(rows_of(module))
    refuse_shared_memory(module)
    with agreed(bool(checkpoints.rows)):
        check_tied(module, checkpoints)
    dtype, given = module_dtype(module), X
    if task in TEXT_TASKS:
        if (ignored := ignore_index_of(criterion)) is not None:
            y = without_ignored(y, ignored)
        X = with_decoder_inputs(module, X, y, kind_of_model(module, task))
    if isinstance(X, IndexedRows):
        row = to_inputs(X.take(torch.zeros(1, dtype=torch.long)), dtype, where)
    else:
        row = to_inputs(map_inputs(lambda part: to_tensor(part[:1]).clone(), X), dtype, where)
    output, call, activation = _probe(module, row, forward)
    if {*map(SWITCHES, map(type, module.modules()))} != {PLAIN} and not sharded_parts(module):
        refuse_merging(module, row, forward, checkpoints.layout)
    outputs = Outputs.of(output, y, task, classes, criterion, call, module, given)
    check_log_probabilities(criterion, output, outputs.is_text)
    targets = outputs.encode(y, dtype, where)
    is_streamed = not fits(X, where)
    if not isinstance(X, IndexedRows):
        X = to_inputs(X, dtype, torch.device("cpu") if is_streamed else where)
    weights = None if weight is None else to_tensor(weight).to(where, dtype)
    data = HeldOut(X, targets, weights, is_streamed, outputs.counted(targets))
    if data.amounts is not None and not bool(data.amounts.any()):
        raise ValueError("sample_weight is 0 for all rows that have a label.")
    if cache is not None:
        predicts = list(encode_module(module)), forward, task, outputs.one_logit, outputs.classes
        cache = cache.within(
            getattr(X, "digest", X), data.y, weight, y, *predicts, batch_size, precision,
            autocast_dtype(data.y.device),
        )  # fmt: skip
    objective = Objective(module, criterion, outputs, precision, compile, forward)
    return Problem(
        checkpoints,
        group_layers(module, checkpoints.layout, layerwise),
        data,
        objective,
        Evaluator(objective, data, batch_size, y, weight, cache=cache),
        no_progress if progress is None else partial(progress, module),
        cache,
        judge_outputs(output, activation, outputs, call),
    )


@contextmanager
def no_progress(name: str, n_steps: int) -> Iterator[Step]:
    """No-op progress callback."""
    yield lambda weights=None: None


def _probe(module: nn.Module, row: Any, forward: Any) -> tuple[torch.Tensor, str, str]:
    """Output for one row, which determines how outputs are read.

    With the call as code, and the activation that the output comes from.
    """
    try:
        with torch.no_grad(), Watch() as watch:
            found = called(module, row, forward)
            output = as_rows(found, row)
        return output, as_code(row, found, forward), watch.activation_of(output)
    except Exception as error:  # of any class, if X does not fit
        if isinstance(error, TypeError) and "module returned" in str(error):
            raise
        if world_size() > 1 and LOST.search(str(error)):
            raise
        fed = map_inputs(lambda part: f"shape {tuple(part.shape)} and dtype {part.dtype}", row)
        fed = ", ".join(f"{k}: {v}" for k, v in fed.items()) if isinstance(fed, dict) else fed
        raise ValueError(
            f"The module does not accept X: with one row of {fed}, it raised "
            f"{type(error).__name__}: {error}. Floating-point inputs are converted to the module's "
            f"dtype, integers are passed unchanged, a mapping by name and a tuple by position."
        ) from error


@dataclass(frozen=True)
class SoupScorer:
    """A scikit-learn scorer on the held-out rows; ``soup`` is the fitted soup that it gets."""

    soup: Any
    scorer: Callable[..., float]
    X: Any
    y: NDArray[Any]
    weight: NDArray[np.float64] | None

    def __call__(self, module: nn.Module) -> float:
        soup = copy.copy(self.soup)
        soup.module_ = module
        extra = {} if self.weight is None else {"sample_weight": self.weight}
        X = self.X
        if is_multiple(X) or soup.task in TEXT_TASKS:  # lets a scorer call soup.module_(**X)
            X = to_inputs(X, module_dtype(module), next(module.parameters()).device)
        return float(self.scorer(soup, X, self.y, **extra))

    def on(self, rows: NDArray[np.int64]) -> SoupScorer:
        """The same on some of the rows."""
        weight = None if self.weight is None else self.weight[rows]
        if isinstance(self.X, IndexedRows):
            X = self.X.select(torch.as_tensor(rows))
        else:
            X = map_inputs(lambda part: part[rows], self.X)
        return replace(self, X=X, y=self.y[rows], weight=weight)


def scorer_of(soup: Any, scoring: Any) -> Callable[..., float]:
    """A scikit-learn scorer for a fitted soup; the log-loss for all labels, present or not."""
    if scoring == "neg_log_loss" and is_log_likelihood(soup):
        return _log_likelihood
    if scoring == "neg_log_loss" and soup.task == "multilabel":
        raise ValueError(
            "scoring='neg_log_loss' can't be used with task='multilabel': scikit-learn's log-loss "
            "ignores the labels that are absent, so the best network would predict all of them. "
            "Use 'average_precision', 'roc_auc' or 'f1_micro'."
        )
    scorer: Callable[..., float] = check_scoring(soup, scoring)
    outputs = soup.outputs_
    if outputs.leaves_out and not outputs.is_text and isinstance(scoring, (str, SCORER)):
        return LabeledScorer(scorer)
    return scorer


@dataclass(frozen=True)
class LabeledScorer:
    """A scikit-learn scorer on labeled pixels, tokens or rows, with the weights of their rows."""

    scorer: Callable[..., float]

    def __call__(self, soup: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
        y = np.asarray(to_numpy(y))
        used = soup.outputs_.labeled(y)
        seen = LabeledPositions(soup, used)
        if sample_weight is None:
            return float(self.scorer(seen, X, y[used]))
        counts = used.reshape(len(used), -1).sum(axis=1)
        return float(self.scorer(seen, X, y[used], sample_weight=np.repeat(sample_weight, counts)))


class LabeledPositions(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The predictions of a soup for the positions or rows that have a label, one after another."""

    def __init__(self, soup: Any, used: NDArray[np.bool_]) -> None:
        self.soup, self.used, self.classes_ = soup, used, soup.classes_

    def predict(self, X: Any) -> NDArray[Any]:
        predicted: NDArray[Any] = self.soup.predict(X)[self.used]
        return predicted

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = np.moveaxis(self.soup.predict_proba(X), 1, -1)
        return probabilities[self.used]


def is_log_likelihood(soup: Any) -> bool:
    """Whether the log-loss is that of ``mean_log_likelihood``: not of several labels per row."""
    return soup.outputs_.classes is not None or soup.outputs_.is_text


def _log_likelihood(soup: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
    return float(soup.mean_log_likelihood(X, y, sample_weight))


def scored_by(soup: Any, scoring: Any, problem: Problem, X: Any) -> Problem:
    """The problem, with another metric than the default one of the task."""
    evaluate = problem.evaluate
    if scoring == DEFAULT_SCORING[problem.objective.outputs.task]:
        return problem
    scorer = SoupScorer(soup, scorer_of(soup, scoring), X, evaluate.y, evaluate.weight)
    cache = None if evaluate.cache is None else evaluate.cache.within(scoring)
    return replace(problem, evaluate=replace(evaluate, scorer=scorer, cache=cache))


# ---------------------------------------------------------------- gradient-based recipes


def check_descent(soup: Any) -> None:
    """Check the parameters of a gradient-based recipe."""
    check_choice(soup.optimizer, "optimizer", tuple(OPTIMIZERS))
    check_choice(soup.schedule, "schedule", SCHEDULES)
    check_choice(soup.precision, "precision", ("fp32", "bf16"))
    if not (isinstance(soup.lr, Real) and math.isfinite(soup.lr) and float(soup.lr) > 0):
        raise ValueError(f"lr must be a finite number > 0, got {soup.lr!r}.")
    if soup.weight_decay != "auto":
        check_scalar(soup.weight_decay, "weight_decay", Real, min_val=0)
        if not math.isfinite(soup.weight_decay):
            raise ValueError(f"weight_decay must be finite, got {soup.weight_decay!r}.")
    resolve_delta_dtype(soup.delta_dtype, torch.float32)
    check_flag(soup.shuffle, "shuffle")
    for name in ("max_epochs", "model_epochs", "accumulate"):
        value = getattr(soup, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    memory_limit_of(soup)


def memory_limit_of(soup: Any) -> int | None:
    """The limit of an estimator in bytes; None where it has none."""
    limit = getattr(soup, "memory_limit", None)
    return None if limit is None else parse_bytes(limit)


def warn_of_lr(soup: Any) -> None:
    """Warn if steps are longer than the coefficients."""
    if soup.optimizer == "adamw" and soup.lr > 1 and not getattr(soup, "normalize", False):
        soup._warn(
            f"lr={soup.lr:g} is the step length of AdamW in units of coefficients, which sum to 1, "
            f"so the search can't converge to a good soup. Usual values are 0.01 to 0.1."
        )


def check_minibatches(soup: Any, problem: Problem, aside: HeldOut | None = None) -> None:
    """Check that BatchNorm can normalize by the minibatches of a search, if it has to."""
    if soup.batch_norm != "recalibrate" or not statistics(problem.module):
        return
    for n in (len(rows) for rows in (problem.data, aside) if rows is not None):
        size = min(soup.batch_size or n, n)
        if size == 1 or n % size == 1:
            raise ValueError(
                f"batch_norm='recalibrate' normalizes by the statistics of each minibatch, which a "
                f"single row does not have, but {n} rows in minibatches of {size} leave a "
                f"minibatch of one row. Change batch_size."
            )
    if world_size() > 1:
        raise ValueError(
            "batch_norm='recalibrate' normalizes by each minibatch, which is split between the "
            "ranks of a distributed job. Use batch_norm='auto' or 'average'."
        )


def check_sharded(soup: Any, problem: Problem) -> None:
    """Raise an error for options that a sharded module does not support."""
    if not problem.objective.is_sharded:
        return
    if soup.compile:
        raise ValueError(
            "compile=True can't be used with a sharded module: the compiled module would hold all "
            "weights. Use compile=False."
        )
    if soup.batch_norm != "average" and statistics(problem.module):
        raise ValueError(
            f"batch_norm={soup.batch_norm!r} can't be used with a sharded module, because each "
            f"rank sees only a part of the rows. Use batch_norm='average'."
        )
    if effective_n_jobs(getattr(soup, "n_jobs", None)) > 1:
        raise ValueError(
            f"n_jobs={soup.n_jobs} can't be used with a sharded module, which workers can't copy; "
            f"its ranks already split the rows. Use n_jobs=None."
        )


def weight_decay_of(soup: Any, problem: Problem) -> float:
    """The weight decay: as given, or that of a prior, whose weight in the mean loss is 1 / N.

    ``lr * weight_decay`` is at most 1, since then a step already cancels all previous ones.
    """
    if soup.weight_decay != "auto":
        return float(soup.weight_decay)
    amounts = problem.data.amounts
    n = len(problem.data) if amounts is None else int((amounts > 0).sum())
    return min(DECAY_ROWS / n, 1 / float(soup.lr))


def settings_of(soup: Any, problem: Problem) -> Settings:
    """The settings of the gradient descent of a recipe."""
    return Settings(
        soup.optimizer,
        soup.schedule,
        float(soup.lr),
        int(soup.max_epochs),
        None if soup.batch_size is None else int(soup.batch_size),
        bool(soup.shuffle),
        int(soup.accumulate),
        soup.batch_norm == "recalibrate",
        weight_decay_of(soup, problem),
    )


def storage_for(soup: Any, problem: Problem, n_ahead: int = 0) -> DeltaStorage:
    """How a recipe stores deltas; only files are read ahead."""
    checkpoints = problem.checkpoints
    has_files = any(checkpoints.path(name) is not None for name in checkpoints)
    return DeltaStorage(memory_limit_of(soup), soup.delta_dtype, n_ahead if has_files else 0)


def search_cache(soup: Any, problem: Problem, *more: Any) -> Cache | None:
    """The cache of a descent, keyed by everything that affects its result except the seed."""
    if problem.cache is None:  # avoids hashing checkpoints in memory
        return None
    return problem.cache.within(
        type(soup).__name__,
        [problem.checkpoints.identity(name) for name in problem.checkpoints],
        problem.layers.rows,
        problem.objective.criterion,
        vars(settings_of(soup, problem)),
        soup.precision,
        bool(soup.compile),
        str(soup.delta_dtype),
        *more,
    )
