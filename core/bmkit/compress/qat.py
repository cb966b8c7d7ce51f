"""How a step that trains rounds weights in its forward pass: as the export behind it will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bmkit import model as models
from bmkit.compress.options.rounding import Quantize
from bmkit.compress.steps.rounding import grid_of
from bmkit.compress.work import scope
from bmkit.errors import InputError
from bmkit.nn import walk
from bmkit.nn.qat import Round, rounded_weights
from bmkit.nn.rounding import round_matrix


def as_exported(step: Quantize, widths: list[int], stored: torch.dtype) -> Round:
    """Return what `step` makes of a weight that is written in the dtype `stored` before.

    `widths` are the inputs of all layers that it rounds. Raises RecipeError as `grid_of` does.
    """
    grid = grid_of(step, widths)

    def round_weight(weight: Tensor) -> Tensor:
        return round_matrix(weight.to(stored), grid).dense()

    return round_weight


@dataclass(frozen=True)
class Rounding:
    """The rounding of the checkpoint at `path` by a step that comes later."""

    path: Path
    step: Quantize
    activations: int | None = None
    """Bits of what goes into the layers; None: not rounded."""

    @contextmanager
    def of(self, student: nn.Module) -> Iterator[None]:
        """Let the layers of `student` that the step will round compute with rounded weights.

        Raises InputError for a weight that is no number.
        """
        found = scope(self.path, self.step.exclude_modules)
        stored = models.stored_dtype(models.load_config(self.path))
        layers = {n: m for n, m in walk.linears(student).items() if n not in found.left}
        for name, layer in layers.items():
            if not torch.isfinite(layer.weight).all():
                raise InputError(f"{self.path}: layer {name}: it holds NaN or infinite weights")
        round_weight = as_exported(self.step, found.widths, stored)
        with rounded_weights(layers.values(), round_weight, activations=self.activations):
            yield
