"""Fine-tune one candidate of a search from the initial weights that all of them share."""

from __future__ import annotations

import inspect
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from torch import nn

from ..checkpoints.folders import read_metadata
from ..checkpoints.write import write_safetensors
from ..exceptions import CheckpointError, SoupWarning
from ..runtime.copies import copied, refers_to_itself
from ..runtime.random_state import preserved_random_state

RECORD = "sksoup.candidate"  # key of a candidate's record in its file's metadata


@dataclass(frozen=True)
class Candidate:
    """Result of one training run: weights in memory or in a file, or an error."""

    score: float
    fit_time: float
    error: str | None = None
    weights: dict[str, torch.Tensor] | Path | None = None
    module: nn.Module | None = None  # for the architecture, if there is no start


def refuse_pipeline(estimator: Any) -> None:
    """Raise an error for a pipeline, which would preprocess rows differently per candidate."""
    if hasattr(estimator, "steps"):
        raise TypeError(
            "estimator is a Pipeline, expected a net, because the rows must be preprocessed in the "
            "same way for all candidates. Put the search into the pipeline: make_pipeline(scaler, "
            "SoupSearchCV(net, {'lr': ...}))."
        )


def check_takes_weight(estimator: Any, scoring: Any) -> None:
    """Check before training that candidates can be scored with sample weights."""
    score = estimator.score if scoring is None else scoring
    if callable(score) and not _takes_weight(score, keywords=True):
        what = f"score of {type(estimator).__name__}" if scoring is None else f"scoring={scoring!r}"
        raise TypeError(
            f"sample_weight was passed, but {what} has no such parameter. Pass a scorer that "
            f"accepts it, such as scoring='accuracy', or omit sample_weight."
        )


def _takes_weight(function: Callable[..., Any], keywords: bool = False) -> bool:
    """Whether a function has a parameter ``sample_weight``, or accepts any ``keywords``."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "sample_weight" in parameters or (keywords and takes_any)


def find_start(estimator: Any) -> nn.Module | None:
    """Copy the module from which all candidates start; None if the estimator has none."""
    if not (hasattr(estimator, "initialize") and hasattr(estimator, "partial_fit")):
        return None
    fitted = getattr(estimator, "module_", None)
    if isinstance(fitted, nn.Module):
        return copied(fitted).cpu()
    if not isinstance(estimator.module, nn.Module):
        warnings.warn(
            "The estimator's module is not an instance, so every clone would start from different "
            "random weights, and their soup would not work. Random initial weights are now drawn "
            "once for all candidates. Pass a module instance with pretrained weights, or a fitted "
            "net.",
            SoupWarning,
            stacklevel=3,  # the call of fit
        )
    with preserved_random_state():
        module: nn.Module = _cloned(estimator).initialize().module_
    return copied(module).cpu()  # the candidates may share memory with it, such as of a table


def _cloned(estimator: Any) -> Any:
    """A clone; `copy.deepcopy`, by which scikit-learn copies a module, does not copy functions."""
    cloned, module = clone(estimator), getattr(estimator, "module", None)
    if not (isinstance(module, nn.Module) and refers_to_itself(module)):
        return cloned
    return type(cloned)(**{**cloned.get_params(deep=False), "module": copied(module)})


def fine_tune(
    estimator: Any,
    params: Mapping[str, Any],
    seed: int,
    start: nn.Module | None,
    parts: Sequence[Any],
    weights: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    scorer: Any,
    path: Path | None,
) -> Candidate:
    """Fine-tune and score one candidate, or read it if it is on disk."""
    if path is not None and path.exists():
        return _recorded(path)
    X, y, X_held_out, y_held_out = parts
    train_weight, held_out_weight = ({"sample_weight": w} for w in weights) if weights else ({}, {})
    begin = time.perf_counter()
    try:
        with preserved_random_state():
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - training may draw from it; restored afterwards
            random.seed(seed)
            net = _cloned(estimator).set_params(**params)
            if start is not None:
                net.initialize()
                _load_start(net.module_, start)
            train = net.fit if start is None else net.partial_fit
            train(X, y, **(train_weight if _takes_weight(train) else {}))
            spent = time.perf_counter() - begin
            score = float(scorer(net, X_held_out, y_held_out, **held_out_weight))
        state = state_of(net.module_)
        bad = [n for n, w in state.items() if w.is_floating_point() and not w.isfinite().all()]
        if bad or not math.isfinite(score):
            where = f"{bad[0]!r} holds NaN or infinity" if bad else f"its score is {score}"
            raise ValueError(f"the fine-tuning diverged: {where}")
    except Exception as error:
        # a candidate that fails for any reason is reported and left out
        return Candidate(math.nan, math.nan, f"{type(error).__name__}: {error}")
    module = copied(net.module_).cpu() if start is None else None
    if path is not None:
        record = {"score": score, "fit_time": spent, "params": repr(dict(params))}
        write_safetensors(path, state, {RECORD: json.dumps(record)})
    return Candidate(score, spent, weights=path or state, module=module)


def _recorded(path: Path) -> Candidate:
    """A candidate as it was written."""
    try:
        record = json.loads(read_metadata(path)[RECORD])
        score, fit_time = float(record["score"]), float(record["fit_time"])
        if math.isfinite(score):
            return Candidate(score, fit_time, weights=path)
        reason = f"its score is {score}"
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"{str(path)!r} is not a candidate written by a search: {reason}. Remove it, and it is "
        f"trained again."
    )


def _load_start(module: nn.Module, start: nn.Module) -> None:
    try:
        module.load_state_dict(start.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"the sampled parameters change the architecture, so it can't start from the shared "
            f"weights: {error}"
        ) from error


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, on the CPU, copied."""
    return {name: w.detach().cpu().clone() for name, w in module.state_dict().items()}
