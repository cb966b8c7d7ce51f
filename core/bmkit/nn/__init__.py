"""Walking a model's modules."""
