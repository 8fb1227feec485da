"""Errors and warnings that sksoup raises itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["CheckpointError", "DivergenceError", "RankError", "RecipeError", "SoupWarning"]


class CheckpointError(ValueError):
    """Raised when a checkpoint can't be read, changed on disk or does not fit the others.

    The message names the file, what was found, what was expected and what to do about it.
    """


class RecipeError(ValueError):
    """Raised when a recipe can't be read, or does not fit the checkpoints it is cooked with."""


class DivergenceError(ArithmeticError):
    """Raised when the loss or the coefficients stop being finite during a search.

    Parameters
    ----------
    message : str
        What happened, at which step (and outer iteration of MEHL-Soup).
    coef : ndarray of shape (n_layers, n_checkpoints), dtype float64, or None
        The coefficients before the epoch that failed.

    Attributes
    ----------
    coef : ndarray of shape (n_layers, n_checkpoints), dtype float64, or None
        The last good coefficients: ``mix(checkpoints, error.coef, layers=...)`` rebuilds them.
    """

    def __init__(self, message: str, coef: NDArray[np.float64] | None = None) -> None:
        super().__init__(message)
        self.coef = coef


class RankError(RuntimeError):
    """Raised on the ranks of a distributed job that are left when another one stopped."""


class SoupWarning(UserWarning):
    """Warns of something that is allowed but rarely what was meant."""
