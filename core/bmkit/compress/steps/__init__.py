"""The steps of a recipe, each from one checkpoint to the next."""
