"""Public names for authors of recipes: what a recipe is made of, and what it is given."""

from .engine.descent import DeltaStorage, Descent, Settings, within_memory
from .engine.objective import load_weights
from .engine.problem import Found, Problem, rank_checkpoints
from .recipes.base import BaseSoup

__all__ = [
    "BaseSoup",
    "DeltaStorage",
    "Descent",
    "Found",
    "Problem",
    "Settings",
    "load_weights",
    "rank_checkpoints",
    "within_memory",
]
