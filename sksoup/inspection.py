"""Look at soups: pictures, all systems side by side on the same data, the loss in between."""

from ._barrier import LossBarrier, LossBarrierDisplay, loss_barrier
from ._comparison import SoupComparison, SoupResult, compare_soups, paper_systems
from ._displays import (
    CoefficientsDisplay,
    ComparisonDisplay,
    GreedyPathDisplay,
    LearningCurveDisplay,
)

__all__ = [
    "CoefficientsDisplay",
    "ComparisonDisplay",
    "GreedyPathDisplay",
    "LearningCurveDisplay",
    "LossBarrier",
    "LossBarrierDisplay",
    "SoupComparison",
    "SoupResult",
    "compare_soups",
    "loss_barrier",
    "paper_systems",
]
