"""Leave layers out: which of a stack stay, and what their tensors are called then."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def spread(count: int, keep: int) -> list[int]:
    """Choose `keep` of `count` layers, evenly over the depth, the first and the last among them."""
    if keep == 1:
        return [0]
    return sorted({round(i * (count - 1) / (keep - 1)) for i in range(keep)})


def renamed(name: str, stack: str, kept: list[int]) -> str | None:
    """Return what a tensor of a model is called with only `kept` layers of `stack`; None if gone.

    `stack` is the name of the list of layers, as `model.layers`.
    """
    found = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.*)", name)
    if found is None:
        return name
    layer = int(found[1])
    return f"{stack}.{kept.index(layer)}.{found[2]}" if layer in kept else None


def fewer(config: Mapping[str, Any], key: str, count: int, kept: list[int]) -> dict[str, Any]:
    """Return what `config.json` says of a model with only `kept` of its `count` layers.

    `key` is what it calls their number.
    """
    found = {**config, key: len(kept)}
    for name in ("layer_types", "no_rope_layers"):
        if isinstance(found.get(name), list) and len(found[name]) == count:
            found[name] = [found[name][i] for i in kept]
    if isinstance(found.get("max_window_layers"), int):
        found["max_window_layers"] = sum(i < found["max_window_layers"] for i in kept)
    return found
