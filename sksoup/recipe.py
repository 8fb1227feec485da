"""The record of a soup, by its public name."""

from .mixing.recipe import Ingredient, Recipe, Verification

__all__ = ["Ingredient", "Recipe", "Verification"]
