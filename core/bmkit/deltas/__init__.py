"""Deltas: how each kind is configured, and which modules it addresses."""
