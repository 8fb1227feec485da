"""The record of a soup: public names."""

from .mixing.ingredients import Base, Ingredient
from .mixing.recipe import Recipe
from .mixing.verification import Verification

__all__ = ["Base", "Ingredient", "Recipe", "Verification"]
