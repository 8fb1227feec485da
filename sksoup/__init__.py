"""Model soups: mix fine-tuned checkpoints into one better network, as scikit-learn estimators."""

__version__ = "0.1.0"

from ._mix import mix
from .baselines import BestCheckpoint, CheckpointEnsemble, UniformSoup
from .checkpoints import CheckpointCollection
from .exceptions import CheckpointError, DivergenceError, RankError, RecipeError, SoupWarning
from .greedy import GreedySoup
from .learned import LearnedSoup
from .mehl import MEHLSoup
from .recipe import Recipe

__all__ = [
    "BestCheckpoint",
    "CheckpointCollection",
    "CheckpointEnsemble",
    "CheckpointError",
    "DivergenceError",
    "GreedySoup",
    "LearnedSoup",
    "MEHLSoup",
    "RankError",
    "Recipe",
    "RecipeError",
    "SoupWarning",
    "UniformSoup",
    "mix",
]
