"""Which checkpoints the packed decoder can run, told from `config.json` alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmkit.errors import InputError
from bmkit.plan import read_headers

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
        and readable(config.get("quantization_config"))
        and not rounds_inputs(config.get("quantization_config"))
    )


def readable(quantization: Any) -> bool:
    """Tell whether weights stored like this can stay packed: integers of 2, 3, 4 or 8 bits."""
    if not quantization:
        return True
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    groups = list((quantization.get("config_groups") or {}).values())
    kind = quantization.get("format")
    return (
        bool(groups)
        and kind in ("pack-quantized", "int-quantized")
        and all(
            _stays(g.get("weights") or {}, plain=kind == "int-quantized")
            and _known(g.get("input_activations"))
            and not g.get("output_activations")
            for g in groups
        )
    )


def rounds_inputs(quantization: Any) -> bool:
    """Tell whether a checkpoint wants what goes into its layers rounded as well."""
    if not quantization:
        return False
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    groups = (values.get("config_groups") or {}).values()
    return any(g.get("input_activations") for g in groups)


def _known(inputs: Mapping[str, Any] | None) -> bool:
    if not inputs:
        return True
    how = ("token", True) if inputs.get("dynamic") else ("tensor", False)
    return (inputs.get("type"), inputs.get("num_bits"), inputs.get("symmetric")) == (
        "int",
        8,
        True,
    ) and (inputs.get("strategy"), bool(inputs.get("dynamic"))) == how


def _stays(weights: Mapping[str, Any], *, plain: bool) -> bool:
    if plain and (weights.get("num_bits"), weights.get("symmetric")) != (8, True):
        return False
    return (
        weights.get("type") == "int"
        and weights.get("num_bits") in (2, 3, 4, 8)
        and weights.get("strategy") in ("channel", "group", "tensor")
        and weights.get("actorder") not in ("group", True)  # that stores an order of inputs
    )


def plain_lora(folder: Path) -> bool:
    """Tell whether the adapter in `folder` is LoRA on projections, and nothing besides."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        names = [t.name for t in read_headers(folder).tensors]
    except (OSError, ValueError, InputError):
        return False
    return (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and not any(config.get(key) for key in _NOT_PLAIN)
        and not _takes_part(config)
        and all(_LORA.fullmatch(name) for name in names)
    )


def replaces_modules(folder: Path) -> bool:
    """Tell whether the adapter in `folder` brings whole modules, rows of a table, or a prompt.

    Such a one needs the model's own dense modules.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        names = [t.name for t in read_headers(folder).tensors]
    except (OSError, ValueError, InputError):
        return True
    return (
        config.get("peft_type") not in _BESIDE
        or _takes_part(config)
        or bool(config.get("modules_to_save"))
        or bool(config.get("trainable_token_indices"))
        or bool(config.get("target_parameters"))
        or any("embedding" in name or name.endswith("embed_tokens.weight") for name in names)
    )


_BESIDE = {"LORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "BOFT"}
_BESIDE |= {"BMKIT_ADAPTER", "BMKIT_PARALLEL_ADAPTER", "BMKIT_BITFIT"}
"""Types that leave the model's modules where they are, and read no weights."""


def _takes_part(config: Mapping[str, Any]) -> bool:
    """Tell whether a LoRA's beginning was taken out of the weights, as PiSSA's is."""
    begun = config.get("init_lora_weights")
    return isinstance(begun, str) and begun.startswith(("pissa", "olora", "corda", "loftq"))


_NOT_PLAIN = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_LORA = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\."
    r"((?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj)\.lora_([AB])\.weight"
)


def lora_part(name: str) -> tuple[int, str, str]:
    """Return block, module and `A` or `B` of a tensor of a plain LoRA adapter."""
    found = _LORA.fullmatch(name)
    assert found is not None  # `plain_lora` has looked
    return int(found[1]), found[2], found[3]
