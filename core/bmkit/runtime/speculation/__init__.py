"""Draft and verify: guesses from phrases and from a draft model, checked in one forward."""
