"""LoRA that begins with what rounding or pruning has taken from a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from bmkit.errors import InputError
from bmkit.report import Reporter, task
from bmkit.runtime.placed.load import empty
from bmkit.runtime.placed.origin import Origin

SAME = 1e-3
"""A weight that differs by less, as a share of its size, has lost nothing (bfloat16 keeps that)."""


@torch.no_grad()
def begin_with_lost(model: Any, name: str, original: Path, reporter: Reporter) -> float:
    """Set the LoRA `name` on `model` to the best approximation of what its weights lack.

    Of each layer, that is the part of rank r of the difference D between the weight of the model at
    `original` and its own, by singular values: no matrices of that rank leave less of D (LoftQ,
    arXiv 2310.08659, with one step, since the rounded weights stay as they are; LQ-LoRA, arXiv
    2311.12023). Returns which share of ‖D‖² is left, over all layers. Peak memory: one layer's
    weight four times in float32. Raises InputError for a model of other layers, or one that has
    lost nothing.
    """
    source = Origin(original, empty(original))
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }
    lost = left = size = 0.0
    with task(reporter, "what was lost", len(layers), "layers") as bar:
        for path, module in layers.items():
            weight: Any = module.get_base_layer().weight
            own = path.removeprefix("base_model.model.") + ".weight"
            if not source.holds(own):
                raise InputError(
                    f"original: {original} has no {own}",
                    hint="name the model that this one was made from",
                )
            whole = source.tensor(own).to(weight.device, torch.float32)
            if whole.shape != weight.shape:
                raise InputError(
                    f"original: {own} has the shape {list(whole.shape)} there, "
                    f"{list(weight.shape)} here"
                )
            size += float(whole.square().sum())
            whole -= weight.float()
            if getattr(module, "fan_in_fan_out", False):
                whole = whole.T
            before = float(whole.square().sum())
            u, s, v = torch.linalg.svd(whole, full_matrices=False)
            rank = min(module.r[name], len(s))  # what is above it still begins with nothing
            root = (s[:rank] / module.scaling[name]).sqrt()
            module.lora_A[name].weight[:rank] = root[:, None] * v[:rank]
            module.lora_B[name].weight[:, :rank] = u[:, :rank] * root
            lost += before
            left += before - float(s[:rank].square().sum())
            bar.advance(1)
    if lost <= SAME**2 * size:
        raise InputError(
            f"original: {original} has the weights that this model has; nothing was lost",
            hint="leave `original` out, or name the model that this one was rounded from",
        )
    return left / lost
