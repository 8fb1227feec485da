"""Inspect soups: displays, comparisons on the same data, importance, loss barriers."""

from ..displays.coefficients import CoefficientsDisplay
from ..displays.comparison import ComparisonDisplay
from ..displays.greedy_path import GreedyPathDisplay
from ..displays.importance import IngredientImportanceDisplay
from ..displays.learning_curve import LearningCurveDisplay
from .barrier import LossBarrier, loss_barrier
from .barrier_display import LossBarrierDisplay
from .comparison import centered_systems, compare_soups, paper_systems
from .importance import IngredientImportance, ingredient_importance
from .interpolation import InterpolationDisplay, InterpolationPath, interpolation_path
from .results import SoupComparison, SoupResult

__all__ = [
    "CoefficientsDisplay",
    "ComparisonDisplay",
    "GreedyPathDisplay",
    "IngredientImportance",
    "IngredientImportanceDisplay",
    "InterpolationDisplay",
    "InterpolationPath",
    "LearningCurveDisplay",
    "LossBarrier",
    "LossBarrierDisplay",
    "SoupComparison",
    "SoupResult",
    "centered_systems",
    "compare_soups",
    "ingredient_importance",
    "interpolation_path",
    "loss_barrier",
    "paper_systems",
]
