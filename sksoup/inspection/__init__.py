"""Inspection of soups: displays, comparisons on the same data, and loss barriers."""

from ..displays.coefficients import CoefficientsDisplay
from ..displays.comparison import ComparisonDisplay
from ..displays.greedy_path import GreedyPathDisplay
from ..displays.learning_curve import LearningCurveDisplay
from .barrier import LossBarrier, loss_barrier
from .barrier_display import LossBarrierDisplay
from .comparison import centered_systems, compare_soups, paper_systems
from .results import SoupComparison, SoupResult

__all__ = [
    "CoefficientsDisplay",
    "ComparisonDisplay",
    "GreedyPathDisplay",
    "LearningCurveDisplay",
    "LossBarrier",
    "LossBarrierDisplay",
    "SoupComparison",
    "SoupResult",
    "centered_systems",
    "compare_soups",
    "loss_barrier",
    "paper_systems",
]
