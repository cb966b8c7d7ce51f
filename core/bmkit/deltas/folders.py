"""A delta as a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmkit.deltas import own
from bmkit.errors import InputError, LibraryRefusal, first_line
from bmkit.plan import read_json


def config(folder: Path) -> PeftConfig:
    """Read a delta's config. Raises InputError for none, and for a type that PEFT doesn't know."""
    own.register()
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise InputError(f"{folder} holds no delta", hint=f"one has {CONFIG_NAME}")
    values = read_json(file)
    kind = values.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{file}: neither peft nor bmkit knows a delta of type `{kind}`",
            hint="is it of a newer version?",
        )
    with LibraryRefusal(f"{file}: peft can't read it"):
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read a delta's tensors. Raises InputError for a file that is missing or damaged."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise InputError(f"{folder} holds no weights", hint=f"it needs {file.name}")
    try:
        found: dict[str, Tensor] = load_file(file)
    except (SafetensorError, ValueError, KeyError) as exc:
        raise InputError(f"{file} is damaged: {first_line(exc)}") from None
    return found


_ELSEWHERE = {"inference_mode", "base_model_name_or_path", "revision", "task_type", "auto_mapping"}
_ELSEWHERE |= {"peft_version", "target_modules", "exclude_modules", "init_std"}
"""What a config says that doesn't change what given weights compute."""


def differ(one: Any, other: Any) -> str:
    """Tell in which setting two deltas compute differently, in words; nothing if in none."""
    values, others = one.to_dict(), other.to_dict()
    if one.peft_type != other.peft_type:
        return f"it is of type {one.peft_type.lower()}, not {other.peft_type.lower()}"
    keys = (k for k in values if k not in _ELSEWHERE and values[k] != others.get(k))
    return next((f"{k} is {values[k]}, not {others.get(k)}" for k in keys), "")


def write(folder: Path, config: Any, states: Mapping[str, Tensor], base: Any) -> None:
    """Write a delta; the same one gives the same bytes. `config` is changed.

    `base` is the model that it is of; None if the config says that already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.inference_mode = True
    if base is not None and not config.base_model_name_or_path:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    if base is not None and config.task_type is None:
        config.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    apart: dict[str, Tensor] = {}
    for name, tensor in sorted(states.items()):
        apart[name] = torch.empty_like(tensor, device="cpu").copy_(tensor).contiguous()
    save_file(apart, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
