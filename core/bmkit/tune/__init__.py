"""Train a delta on a frozen model."""
