"""bmkit: compress, tune, prompt, run, speed up and talk with language models on small hardware."""

__version__ = "0.1.0"
