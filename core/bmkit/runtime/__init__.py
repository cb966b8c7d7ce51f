"""Running a model: generation and sampling, shared by the engines."""
