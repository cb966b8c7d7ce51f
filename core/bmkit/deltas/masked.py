"""Deltas on pruned weights that are to be merged: zeros stay zeros, in training and afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

from bmkit.nn.zeros import is_pruned


@dataclass
class Masks:
    """Where the weights are that pruning has left, of the layers that have a LoRA update."""

    layers: list[tuple[nn.Linear, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def apply(self) -> None:
        """Set to zero again what a merge has filled; memory: nothing more."""
        for layer, kept in self.layers:
            layer.weight.mul_(kept)


def mask_updates(model: nn.Module) -> Masks:
    """Let LoRA's updates of pruned layers be those that a merge can keep.

    y = (W + s·B·A ∘ [W ≠ 0])·x + b, of plain LoRA without dropout, in place. Memory: a layer's
    update, and a byte for each weight.
    """
    masks = Masks()
    for layer in model.modules():
        if not isinstance(layer, Linear):
            continue
        base = layer.get_base_layer()
        if type(base) is nn.Linear and is_pruned(base.weight):
            kept = base.weight.detach() != 0
            layer.forward = partial(_masked, layer, kept)
            masks.layers.append((base, kept))
    return masks


def _masked(layer: Any, kept: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    working = [] if layer.disable_adapters or layer.merged else layer.active_adapters
    for name in working:
        if name in layer.lora_A:
            update = layer.lora_B[name].weight @ layer.lora_A[name].weight
            update = (layer.scaling[name] * update * kept).to(x.dtype)
            result = result + functional.linear(x, update).to(result.dtype)
    return result
