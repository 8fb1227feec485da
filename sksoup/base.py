"""Public names for authors of recipes: what a recipe is made of, and what it is given."""

from .engine.objective import load_weights
from .engine.problem import Found, Problem, rank_checkpoints
from .recipes.base import BaseSoup

__all__ = ["BaseSoup", "Found", "Problem", "load_weights", "rank_checkpoints"]
