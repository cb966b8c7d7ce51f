"""LoRA as PEFT has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmkit.deltas.modules import Kind
from bmkit.deltas.recipe import Lora

KINDS: tuple[Kind, ...] = ("linear", "embedding")
"""What LoRA can go to."""


def config(spec: Lora, modules: Sequence[str]) -> Any:
    """Return PEFT's LoraConfig for `spec` on exactly `modules`.

    The modules are given by their full names, so that no pattern is left to interpretation; PEFT
    may shorten the list in `adapter_config.json` where that addresses the same modules.
    """
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=spec.r,
        lora_alpha=int(spec.lora_alpha)
        if spec.lora_alpha == int(spec.lora_alpha)
        else spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        use_rslora=spec.use_rslora,
        target_modules=sorted(modules),
        task_type=TaskType.CAUSAL_LM,
    )
