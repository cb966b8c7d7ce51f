"""AdaLoRA's ranks in a model: which of them each layer keeps, by the names a delta has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import AdaLoraConfig
from torch import Tensor

Pattern = dict[str, list[bool]]
"""Names of layers' `lora_E`, each with which of the ranks that it began with are kept."""
AXES = {"lora_A": 0, "lora_B": 1, "lora_E": 0}
"""Along which axis each tensor has its ranks."""


def tuners_of(base: Any) -> dict[str, Any]:
    """Return PEFT's tuners of a model's AdaLoRAs, by PEFT's names of them."""
    found: dict[str, Any] = base.__dict__.setdefault("bmkit_tuners", {})
    return found


def alone(config: Any, name: str, plain: Callable[[str], str]) -> Pattern:
    """Return the pattern of the delta that PEFT calls `name`; an empty one if it has none.

    `plain` tells what a name in the model is without other deltas in it.
    """
    found = config.rank_pattern if isinstance(config, AdaLoraConfig) else None
    return {plain(key.removesuffix(f".{name}")): list(kept) for key, kept in (found or {}).items()}


def kept(states: Mapping[str, Tensor], pattern: Pattern) -> dict[str, Tensor]:
    """Return a delta's tensors without the ranks that it has lost, if they still have them."""
    found = dict(states)
    for name, ranks in pattern.items():
        for part, axis in AXES.items():
            key = f"base_model.model.{name.removesuffix('lora_E')}{part}"
            if states[key].shape[axis] == len(ranks):
                found[key] = states[key][:, ranks] if axis else states[key][ranks]
    return found


def resize(base: Any, name: str, pattern: Pattern) -> None:
    """Take lost ranks out of the layers in a model; `pattern` has their names in it."""
    full = {
        f"{key}.{name}": ranks
        for key, ranks in pattern.items()
        if len(base.get_submodule(key.rpartition(".")[0]).lora_E[name]) == len(ranks)
    }
    tuners_of(base)[name].resize_modules_by_rank_pattern(full, name)


@contextmanager
def hidden(config: Any) -> Iterator[None]:
    """Let PEFT see no pattern while the block runs: it takes its names for a lone delta's."""
    before = getattr(config, "rank_pattern", None)
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = None
    try:
        yield
    finally:
        if isinstance(config, AdaLoraConfig):
            config.rank_pattern = before
