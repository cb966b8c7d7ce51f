"""LoRA that has begun with a part of the weights (PiSSA, OLoRA): written as plain LoRA.

Training changes W - s·B₀·A₀ + s·B·A, where the first two are what is left of the weights. On the
weights as they are stored, the same is an update of twice the rank: s·(B·A - B₀·A₀).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmkit.plan import read_json

PARTS = ("pissa", "olora", "corda", "loftq")
"""How initialisations begin that take something out of the weights."""


def takes_part(config: Any) -> bool:
    """Tell whether a LoRA config changes the weights beside it."""
    begun = getattr(config, "init_lora_weights", None)
    return isinstance(begun, str) and begun.startswith(PARTS)


def as_plain(folder: Path, begun: Mapping[str, Tensor]) -> None:
    """Write the delta in `folder`, which `begun` as these tensors, as plain LoRA on stored weights.

    What isn't LoRA's stays as it is.
    """
    file = folder / "adapter_model.safetensors"
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        before = begun[name].to(tensor.device, tensor.dtype)
        if ".lora_A." in name:
            found[name] = torch.cat((tensor, before))
        elif ".lora_B." in name:
            found[name] = torch.cat((tensor, -before), 1)
        else:
            found[name] = tensor
    save_file({n: t.contiguous() for n, t in found.items()}, file, metadata={"format": "pt"})
    values = read_json(folder / "adapter_config.json")
    more = 2**0.5 if values.get("use_rslora") else 2
    values["init_lora_weights"] = True
    values["r"] *= 2
    values["lora_alpha"] *= more
    values["rank_pattern"] = {n: 2 * r for n, r in (values.get("rank_pattern") or {}).items()}
    patterns = values.get("alpha_pattern") or {}
    values["alpha_pattern"] = {n: more * alpha for n, alpha in patterns.items()}
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
