"""Deltas that train rows which their base doesn't have: those of tokens that were added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def rows_wanted(configs: Iterable[Any]) -> int:
    """Return how many rows the embedding needs for the tokens that PEFT's configs name."""
    most = 0
    for config in configs:
        for name in ("trainable_token_indices", "token_indices"):
            found = getattr(config, name, None) or ()
            parts = found.values() if isinstance(found, Mapping) else (found,)
            most = max([most, *(int(token) + 1 for part in parts for token in part)])
    return most


def grow(base: Any, configs: Iterable[Any]) -> None:
    """Give `base` the rows that deltas are about to fill, as PEFT's Auto classes do."""
    wanted = rows_wanted(configs)
    if wanted and wanted > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(wanted, mean_resizing=False)
