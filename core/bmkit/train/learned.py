"""What training changes in a model, apart from what stays: to keep it, and to put it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bmkit.model import save_tensors


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, and the buffers that are kept, by name.

    One that has several names is there by the first.
    """
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        apart: set[str] = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(recurse=False):
            if name not in apart:
                found[f"{prefix}.{name}".lstrip(".")] = buffer.detach()
    return found


def save_learned(model: Any, file: Path) -> None:
    """Write what training changes into a file, which is there whole or not at all."""
    save_tensors(file, {name: tensor.clone() for name, tensor in learned(model).items()})


@torch.no_grad()
def load_learned(model: Any, file: Path) -> None:
    """Put what `save_learned` has written back into a model, in place."""
    there = learned(model)
    for name, tensor in load_file(file).items():
        there[name].copy_(tensor)
