"""Sums of LoRA deltas of one base: a delta again, exact, its rank the sum of theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor

from bmkit.deltas import folders as saved
from bmkit.errors import InputError, RecipeError

_PART = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
# What makes an update more than scale · B · A, each with the value that it must have.
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
}
_DRAWN = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it is."""


def weighted(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write to `out` the LoRA delta whose update is the sum of those in `folders`, each weighted.

    Weights of 1 add task vectors, and -1 subtracts one (arXiv 2212.04089). Ranks are concatenated,
    so nothing is rounded away. Peak memory: the deltas, in float32. Raises InputError for deltas of
    another type, with more than plain LoRA in them, or of different bases, and RecipeError if
    there are not as many weights as folders.
    """
    if not folders or len(folders) != len(weights):
        raise RecipeError(
            f"weights: there are {len(weights)} of them and {len(folders)} deltas",
            hint="give each delta one",
        )
    configs = [_config(folder) for folder in folders]
    _one_base(folders, configs)
    joined: dict[str, list[tuple[Tensor, Tensor, bool]]] = {}
    for folder, config, weight in zip(folders, configs, weights, strict=True):
        for module, (a, b, table) in _pairs(folder).items():
            factor = weight * _scale(config, module, len(a))
            joined.setdefault(module, []).append((a.float(), b.float() * factor, table))
    states: dict[str, Tensor] = {}
    ranks = {}
    for module, parts in joined.items():
        if len({(a.shape[1:], b.shape[0], table) for a, b, table in parts}) > 1:
            raise InputError(
                f"{module} has other sizes in one of them", hint="all must be of one base"
            )
        a, b = torch.cat([a for a, _, _ in parts]), torch.cat([b for _, b, _ in parts], 1)
        names = ("embedding_A", "embedding_B") if parts[0][2] else ("A.weight", "B.weight")
        for name, tensor in zip(names, (a, b), strict=True):
            states[f"base_model.model.{module}.lora_{name}"] = tensor
        ranks[module] = len(a)
    saved.write(out, _joined(configs[0], ranks), states, None)


def _config(folder: Path) -> Any:
    config = saved.config(folder)
    if config.peft_type != PeftType.LORA:
        raise InputError(
            f"{folder} is of type {config.peft_type.lower()}", hint="only LoRA deltas add up"
        )
    for key, wanted in _PLAIN.items():
        if (value := getattr(config, key, wanted)) != wanted and value:
            raise InputError(
                f"{folder} has {key}: it is more than a sum of products", hint="only plain LoRA is"
            )
    if config.init_lora_weights not in _DRAWN:
        raise InputError(
            f"{folder} was begun as {config.init_lora_weights}, which changes the base as well",
            hint="save it with peft's path_initial_model_for_weight_conversion first",
        )
    return config


def _one_base(folders: Sequence[Path], configs: Sequence[Any]) -> None:
    for key in ("base_model_name_or_path", "fan_in_fan_out"):
        values = [getattr(config, key) for config in configs]
        known = [v for v in values if v is not None]
        other = next((i for i, v in enumerate(values) if v is not None and v != known[0]), None)
        if other is not None:
            raise InputError(
                f"{folders[other]} is of another base: {key} is {values[other]}, not {known[0]}",
                hint="only deltas of one base add up",
            )


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Read A [rank, …] and B [out, rank, …] of each module, and whether it is an embedding."""
    halves: dict[str, dict[str, Tensor]] = {}
    tables = set()
    for key, tensor in saved.tensors(folder).items():
        match = _PART.fullmatch(key)
        if match is None:
            raise InputError(f"{folder} holds {key}, which is no part of plain LoRA")
        halves.setdefault(match[1], {})[match[2]] = tensor
        if ".lora_embedding_" in key:
            tables.add(match[1])
    found = {}
    for module, parts in halves.items():
        if len(parts) != 2 or len(parts["A"]) != parts["B"].shape[1]:
            raise InputError(f"{folder}: {module} lacks a part, or they don't fit each other")
        found[module] = (parts["A"], parts["B"], module in tables)
    return found


def _scale(config: Any, module: str, rank: int) -> float:
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def _joined(first: Any, ranks: dict[str, int]) -> LoraConfig:
    """Return the config of a sum: its scale is 1 everywhere, since B holds the factors."""
    rank = max(ranks.values())
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(ranks),
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
        auto_mapping=first.auto_mapping,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
