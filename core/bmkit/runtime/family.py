"""Which checkpoints the packed decoder can run, told from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are alike: biases or none, query and key norms or none, windows."""
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")
ROTATIONS = {"default", "llama3", "linear", "yarn"}
"""Kinds of rotary embedding that are the same for a prompt of any length."""


def covers(config: Mapping[str, Any]) -> bool:
    """Tell whether a model of this config, stored like this, can run on packed weights."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return (
        config.get("model_type") in FAMILY
        and config.get("hidden_act") in ACTIVATIONS
        and kind in ROTATIONS
        and _readable(config.get("quantization_config"))
    )


def _readable(quantization: Any) -> bool:
    if not quantization:
        return True
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    groups = list((quantization.get("config_groups") or {}).values())
    one = len({str((g.get("weights") or {}).get("num_bits")) for g in groups}) == 1
    return (
        one
        and quantization.get("format") == "pack-quantized"
        and all(
            (g.get("weights") or {}).get("symmetric") and not g.get("input_activations")
            for g in groups
        )
    )
