"""Duplex: a model that listens while it speaks."""
