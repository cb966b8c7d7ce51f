"""A part of what was learned: between the model as it was and as it has become."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer


@torch.no_grad()
def weaken(model: Any, strength: float) -> None:
    """Multiply what LoRA adds to each weight by `strength`, in place.

    That is the mean, weighed so, of the weights before and after training, which keeps more of
    what the model could do before than it loses of what was learned (Robust fine-tuning of
    zero-shot models, arXiv 2109.01903).
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for second in module.lora_B.values():
                second.weight.mul_(strength)
            for weight in module.lora_embedding_B.values():
                weight.mul_(strength)
