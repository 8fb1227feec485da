"""Fine-tune, then soup: searches that keep every candidate's weights."""

from .scorer import CheckpointScorer
from .search import SoupSearchCV

__all__ = ["CheckpointScorer", "SoupSearchCV"]
