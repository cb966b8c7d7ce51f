"""Generate faster without changing what is said: guess ahead, verify in one forward."""
