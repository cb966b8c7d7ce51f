"""From what a model says at masks to labels: scores, calibration, refinement, search."""
