"""Model soups as scikit-learn estimators: mix fine-tuned checkpoints into one better network."""

__version__ = "0.1.0"

from .checkpoints.collection import CheckpointCollection
from .exceptions import CheckpointError, DivergenceError, RankError, RecipeError, SoupWarning
from .mixing.mix import mix
from .mixing.recipe import Recipe
from .recipes.baselines import BestCheckpoint, CheckpointEnsemble, UniformSoup
from .recipes.greedy import GreedySoup
from .recipes.learned import LearnedSoup
from .recipes.mehl import MEHLSoup
from .recipes.pruned import PrunedSoup
from .recipes.stock import ModelStockSoup

__all__ = [
    "BestCheckpoint",
    "CheckpointCollection",
    "CheckpointEnsemble",
    "CheckpointError",
    "DivergenceError",
    "GreedySoup",
    "LearnedSoup",
    "MEHLSoup",
    "ModelStockSoup",
    "PrunedSoup",
    "RankError",
    "Recipe",
    "RecipeError",
    "SoupWarning",
    "UniformSoup",
    "mix",
]
