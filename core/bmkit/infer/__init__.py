"""Generate text with whatever a stage has made."""
