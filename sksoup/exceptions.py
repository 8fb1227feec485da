"""Errors and warnings of sksoup."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["CheckpointError", "DivergenceError", "RankError", "RecipeError", "SoupWarning"]


class CheckpointError(ValueError):
    """Raised when a checkpoint can't be read, changed on disk or does not match the others.

    The message states the file, what was found, what was expected and how to fix it.
    """


class RecipeError(ValueError):
    """Raised when a recipe can't be read, or does not match the checkpoints it is cooked with."""


class DivergenceError(ArithmeticError):
    """Raised when the loss or the coefficients become NaN or infinite during a search.

    Parameters
    ----------
    message : str
        Error message, with the step (and the outer iteration of MEHL-Soup).
    coef : ndarray of shape (n_layers, n_checkpoints), dtype float64, or None
        Coefficients before the epoch that failed.

    Attributes
    ----------
    coef : ndarray of shape (n_layers, n_checkpoints), dtype float64, or None
        Coefficients before the epoch that failed. ``mix(checkpoints, error.coef, layers=...)``
        builds the soup with them.
    """

    def __init__(self, message: str, coef: NDArray[np.float64] | None = None) -> None:
        super().__init__(message)
        self.coef = coef


class RankError(RuntimeError):
    """Raised on the remaining ranks of a distributed job when another rank has stopped."""


class SoupWarning(UserWarning):
    """Warning about something that is allowed but probably not intended."""
