"""Public names for writing new recipes: the base class, and the input and result of a search."""

from .engine.objective import load_weights
from .engine.problem import Found, Problem, rank_checkpoints
from .recipes.base import BaseSoup

__all__ = ["BaseSoup", "Found", "Problem", "load_weights", "rank_checkpoints"]
