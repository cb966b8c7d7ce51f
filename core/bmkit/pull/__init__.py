"""Bring a model in: by name, from a directory, a .gguf file or the hub."""
