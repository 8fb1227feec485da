"""Warnings of `fit`: issued at the line that called it, and kept in ``warnings_``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.survey import MORE, judge
from ..data.labels import numbers_in
from ..data.outputs import Outputs
from ..engine.chance import judge_scores
from ..engine.problem import Problem
from ..engine.scores import Evaluator
from ..exceptions import SoupWarning
from ..mixing.layers import is_variance
from ..runtime.distributed import all_gather

INSIDE = {"sksoup", "sklearn", "joblib", "contextlib", "torch"}  # not the caller of fit
ROUNDING = 1e-6  # error of a score due to float32 outputs; smaller differences are ignored


class WarningMixin:
    """Warnings about unexpected findings of a fit."""

    warnings_: tuple[str, ...]
    recalibrated_: tuple[str, ...]
    classes: Any

    def _warn(self, message: str) -> None:
        """Warn at the caller's line, and keep the message in ``warnings_``."""
        self.warnings_ = (*self.warnings_, message)
        frame, level = inspect.currentframe(), 1
        while frame and frame.f_back and _package(frame) in INSIDE:
            frame, level = frame.f_back, level + 1
        warnings.warn(message, SoupWarning, stacklevel=level)

    def _warn_of_strangers(self, collection: CheckpointCollection, names: Sequence[str]) -> None:
        """Warn of checkpoints that are unrelated to the others, once per fit."""
        relations = collection.relations(names)
        if collection.rows:  # each rank has seen its own
            of_ranks = all_gather(relations)
            relations = next((one for one in of_ranks if one.unrelated), relations)
        if relations.unrelated and not any(MORE in said for said in self.warnings_):
            self._warn(f"{judge(relations)} {MORE}")

    def _warn_of_chance(self, scores: Mapping[str, float], evaluate: Evaluator) -> None:
        """Warn if no score is better than chance (labels in another order?), once per fit.

        ``scores`` were measured by ``evaluate``; scores given by the user are not checked.
        """
        said = judge_scores(scores, evaluate)
        if said is not None and said not in self.warnings_:
            self._warn(said)

    def _warn_of_labels(self, outputs: Outputs, y: NDArray[Any]) -> None:
        """Warn if labels were matched to the outputs without ``classes``, and it may be wrong."""
        classes = outputs.classes
        if classes is None:
            return
        if classes.dtype.kind in "UO" and outputs.names is None:
            self._warn_of_digits(classes)
        n = outputs.n_outputs
        if classes.dtype.kind in "iu" and outputs.names is not None:
            self._warn_of_numbers(classes.tolist(), outputs.names, y)
        # where other classes lack examples, too, it is no surprise that class 0 does
        is_indices = classes.dtype.kind in "iu" and classes[0] == 0
        present = [k for k in np.unique(y).tolist() if 0 <= k < n] if is_indices else []
        is_named = len(numbers_in(outputs.names)) > 0
        if is_indices and not is_named and present == [*range(1, n)]:
            self._warn(
                f"y holds integers below {n}, the number of outputs, but no 0. They are used as "
                f"indices of the outputs, which is right if the labels are 0 to {n - 1}, and wrong "
                f"if they are 1 to {n}. Pass the labels in the order of the outputs: "
                f"classes=range({n}), or classes=range(1, {n + 1})."
            )

    def _warn_of_numbers(self, labels: list[int], names: Sequence[str], y: NDArray[Any]) -> None:
        """Warn if labels were taken for names of the outputs and could also be their indices."""
        n = len(labels)
        is_named = [*map(str, labels)] == [*names] and labels != [*range(n)]
        if is_named and self.classes is None and ((y >= 0) & (y < n)).all():
            self._warn(
                f"The labels in y are names of the module's outputs (id2label in its config) and "
                f"are used as such, but they could also be indices of the outputs. To decide, pass "
                f"the labels in the order of the outputs: classes={labels}, or classes=range({n})."
            )

    def _warn_of_digits(self, classes: NDArray[Any]) -> None:
        """Warn if the labels are numbers as strings, which sort in another order than numbers."""
        texts = classes.tolist()
        if all(isinstance(t, str) and t.isascii() and t.isdigit() for t in texts) and (
            texts != sorted(texts, key=int)
        ):
            self._warn(
                f"The labels are numbers as strings, and are sorted as strings: "
                f"{', '.join(map(repr, texts[:3]))}, .... If the outputs are sorted as numbers, "
                f"the soup is wrong: pass y as integers, or pass the labels in the order of the "
                f"outputs with classes=[...]."
            )

    def _warn_of_rounding(self, score: float, decided: float) -> None:
        """Warn if, because of rounding, the mix scores less than the search computed."""
        if score < decided - ROUNDING * max(1.0, abs(decided)):
            self._warn(
                f"The soup scores {score:.7g} on the rows that it was selected on, less than the "
                f"{decided:.7g} with which its ingredients were accepted: `mix` rounds differently "
                f"than the search, and the predictions of some rows are that close. Hold out more "
                f"rows, or store the checkpoints in a wider dtype."
            )

    def _warn_of_variances(self, problem: Problem, coef: NDArray[np.float64]) -> None:
        """Warn if extrapolation set a running variance to 0, which can ruin the outputs."""
        rows, checkpoints = problem.layers.rows, problem.checkpoints
        zero = {
            name: value.cpu() <= 0
            for name, value in problem.module.state_dict().items()
            if is_variance(name) and name not in self.recalibrated_ and coef[rows[name]].min() < 0
        }
        suspects = {name for name, where in zero.items() if where.any()}
        varies = {name: torch.zeros_like(zero[name]) for name in suspects}
        for checkpoint in checkpoints if suspects else ():  # 0 in all is fine
            with checkpoints.open(checkpoint) as read:
                for name, where in varies.items():
                    where |= read(name) > 0
        clamped = {name: int((zero[name] & where).sum()) for name, where in varies.items()}
        clamped = {name: n for name, n in clamped.items() if n}
        if clamped:
            name, n = next(iter(clamped.items()))
            more = f", and others in {len(clamped) - 1} more layers" if len(clamped) > 1 else ""
            self._warn(
                f"With these coefficients {n} of BatchNorm's running variances in {name!r} would "
                f"be negative{more}. They are set to 0 in the soup, which can make its outputs "
                f"very large. Use batch_norm='recalibrate' to re-estimate them."
            )


def _package(frame: FrameType) -> str:
    """The top-level package of the code that a frame runs."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
