"""A cache of transformers whose keys and values aren't copied for each new token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

AHEAD = 64
"""Tokens that there is room for beyond those that are there."""


def growing(model: Any) -> DynamicCache | None:
    """Return a cache for `model`, or None if it isn't a decoder that keeps all keys and values."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    chosen = getattr(model.generation_config, "cache_implementation", None)
    if supports is None or not supports() or model.config.is_encoder_decoder or chosen:
        return None
    if "mamba" in type(model).__name__.lower():  # it calls its cache otherwise
        return None
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [Growing() for _ in cache.layers]
    return cache


class Growing(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values [batch, heads, time, width], with room behind them."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return all keys and values, the new ones [batch, heads, new, width] behind the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._behind(0, self.keys, key_states)
        self.values = self._behind(1, self.values, value_states)
        return self.keys, self.values

    def _behind(self, which: int, before: Tensor, new: Tensor) -> Tensor:
        known = before.shape[-2] if before.numel() else 0
        count = known + new.shape[-2]
        room = self.rooms[which] if which < len(self.rooms) else None
        ours = room is not None and (not known or before.data_ptr() == room.data_ptr())
        if room is None or not ours or room.shape[0] != len(new) or room.shape[-2] < count:
            batch, heads, _, width = new.shape
            room = new.new_empty(batch, heads, count + max(AHEAD, count // 4), width)
            if known:
                room[:, :, :known] = before
            self.rooms[which : which + 1] = [room]
        room[:, :, known:count] = new
        return room[:, :, :count]

    def reset(self) -> None:
        """Forget all, and the room for it."""
        self.rooms = []
        super().reset()
