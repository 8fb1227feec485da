"""What fitting warns of: at the line that called it, and kept in ``warnings_``."""

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
from ..engine.chance import judge_scores
from ..engine.problem import Problem
from ..engine.scores import Evaluator
from ..exceptions import SoupWarning
from ..mixing.layers import is_variance

INSIDE = {"sksoup", "sklearn", "joblib", "contextlib", "torch"}  # not who called fit
ROUNDING = 1e-6  # of a score: what float32 outputs are off by; less is not worth a warning


class WarningMixin:
    """Warn of what a fit found odd."""

    warnings_: tuple[str, ...]
    recalibrated_: tuple[str, ...]

    def _warn(self, message: str) -> None:
        """Warn at the caller's line, and keep the message in ``warnings_``."""
        self.warnings_ = (*self.warnings_, message)
        frame, level = inspect.currentframe(), 1
        while frame and frame.f_back and _package(frame) in INSIDE:
            frame, level = frame.f_back, level + 1
        warnings.warn(message, SoupWarning, stacklevel=level)

    def _warn_of_strangers(self, collection: CheckpointCollection, names: Sequence[str]) -> None:
        """Warn of checkpoints that share no start with the others; once in a fit."""
        relations = collection.relations(names)
        if relations.unrelated and not any(MORE in said for said in self.warnings_):
            self._warn(f"{judge(relations)} {MORE}")

    def _warn_of_chance(self, scores: Mapping[str, float], evaluate: Evaluator) -> None:
        """Warn where no score is better than a guess: labels in another order; once in a fit.

        ``scores`` were measured by ``evaluate``: those that the user gave are not judged.
        """
        said = judge_scores(scores, evaluate)
        if said is not None and said not in self.warnings_:
            self._warn(said)

    def _warn_of_digits(self, classes: NDArray[Any]) -> None:
        """Warn of texts of numbers that are in another order than the numbers."""
        texts = classes.tolist()
        if all(isinstance(t, str) and t.isascii() and t.isdigit() for t in texts) and (
            texts != sorted(texts, key=int)
        ):
            self._warn(
                f"The labels are numbers as texts, and taken in the order of texts: "
                f"{', '.join(map(repr, texts[:3]))}, .... If the outputs are in that of numbers, "
                f"the soup is wrong: give y as integers, or the labels in output order: "
                f"classes=[...]."
            )

    def _warn_of_rounding(self, score: float, decided: float) -> None:
        """Warn where rounding left the mix below the score that the search decided by."""
        if score < decided - ROUNDING * max(1.0, abs(decided)):
            self._warn(
                f"The soup scores {score:.7g} on the rows that decided, less than the "
                f"{decided:.7g} that its ingredients were accepted with: `mix` rounds in another "
                f"way than the search, and some rows are that close. Hold out more rows, or store "
                f"the checkpoints in a wider dtype."
            )

    def _warn_of_variances(self, problem: Problem, coef: NDArray[np.float64]) -> None:
        """Warn where extrapolation left a running variance at 0, which ruins the outputs."""
        rows, checkpoints = problem.layers.rows, problem.checkpoints
        zero = {
            name: value.cpu() <= 0
            for name, value in problem.module.state_dict().items()
            if is_variance(name) and name not in self.recalibrated_ and coef[rows[name]].min() < 0
        }
        suspects = {name for name, where in zero.items() if where.any()}
        varies = {name: torch.zeros_like(zero[name]) for name in suspects}
        for checkpoint in checkpoints if suspects else ():  # dead in all is no news
            with checkpoints.open(checkpoint) as read:
                for name, where in varies.items():
                    where |= read(name) > 0
        clamped = {name: int((zero[name] & where).sum()) for name, where in varies.items()}
        clamped = {name: n for name, n in clamped.items() if n}
        if clamped:
            name, n = next(iter(clamped.items()))
            more = f", and others in {len(clamped) - 1} more layers" if len(clamped) > 1 else ""
            self._warn(
                f"Under these coefficients {n} of BatchNorm's variances in {name!r} would be "
                f"negative{more}; they are 0 in the soup, which can make its outputs huge. "
                f"batch_norm='recalibrate' measures them anew."
            )


def _package(frame: FrameType) -> str:
    """The top package of the code that runs in a frame."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
