"""Rows of text and chat, from JSON lines to batches."""
