"""Fine-tune and mix: searches that keep the weights of every candidate."""

from .scorer import CheckpointScorer
from .search import SoupSearchCV

__all__ = ["CheckpointScorer", "SoupSearchCV"]
