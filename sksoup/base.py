"""Public names for authors of recipes: what a recipe is made of, and what it is given."""

from .engine.deltas import Deltas
from .engine.descent import Descent, Settings, within_memory
from .engine.objective import Objective, load_weights
from .engine.problem import Found, Problem, Ranking, rank_checkpoints
from .engine.scores import Evaluation, Evaluator
from .mixing.layers import Layers
from .recipes.base import BaseSoup

__all__ = [
    "BaseSoup",
    "Deltas",
    "Descent",
    "Evaluation",
    "Evaluator",
    "Found",
    "Layers",
    "Objective",
    "Problem",
    "Ranking",
    "Settings",
    "load_weights",
    "rank_checkpoints",
    "within_memory",
]
