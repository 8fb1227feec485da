"""The soups: one file a recipe, over the base they share."""
