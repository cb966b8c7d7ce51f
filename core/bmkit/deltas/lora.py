"""LoRA as PEFT has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmkit.deltas.recipe import Lora


def config(spec: Lora, modules: Sequence[str]) -> Any:
    """Return PEFT's LoraConfig for `spec` on exactly `modules`.

    The modules are named in full: what is trained can't depend on how another version of PEFT
    reads a pattern.
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
