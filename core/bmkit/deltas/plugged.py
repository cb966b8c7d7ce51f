"""Saved deltas on a model that answers: all, one or none of them at work. PEFT is imported late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any


def load(
    model: Any,
    folders: Mapping[str, Path],
    wholes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Any:
    """Put saved deltas on `model` by their names, all at work; return the model to use.

    `wholes` names some of them together. Raises InputError for one that doesn't fit the model.
    """
    if not folders:
        return model
    from bmkit.deltas import compose

    model = compose.load(model, folders)
    model.bmkit_wholes = dict(wholes)
    return model


@contextmanager
def only(model: Any, name: str | None) -> Iterator[None]:
    """Let only the delta `name` work while the block runs; None: none of them; `*`: all, as loaded.

    It may be a name of several. A model without deltas stays as it is.
    """
    if name == "*" or not getattr(model, "bmkit_deltas", None):
        yield
        return
    from bmkit.deltas import compose

    parts = () if name is None else getattr(model, "bmkit_wholes", {}).get(name, (name,))
    with compose.active(model, parts):
        yield


def in_front(model: Any) -> int | None:
    """Return how many virtual tokens a delta puts in front of what the model reads; else None."""
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return None
    return int(getattr(config, "num_virtual_tokens", 0))
