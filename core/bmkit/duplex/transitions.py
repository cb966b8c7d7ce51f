"""What users say to stop, to rephrase, to change the topic, …: lists, each item in one split."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bmkit.data import rows
from bmkit.errors import InputError, did_you_mean

SPLITS = ("train", "dev", "test")
LISTS = (
    "stop",
    "rephrase",
    "reset",
    "side",
    "resume",
    "backchannel",
    "noise",
    "hesitation",
    "correction",
    "opener",
    "lead",
    "tail",
)
"""What there has to be: all are texts, those of `side` have an answer behind `=>`."""


@dataclass
class Transitions:
    """The items of one split. `used` are those that were drawn since it was emptied."""

    items: Mapping[str, Sequence[str]]
    used: list[str] = field(default_factory=list)

    def choice(self, kind: str, draw: random.Random) -> str:
        """Return one of a list's items, and note it."""
        found = draw.choice(self.items[kind])
        self.used.append(f"{kind}: {found}")
        return found


def read(path: Path, share: float) -> dict[str, Transitions]:
    """Return a file's lists by split, `share` of each in `dev` and as much in `test`.

    An item's split goes by its hash, and not by a seed: what is held out stays held out. A list of
    fewer than three items is in all splits. Raises InputError for a file that isn't one of lists.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} is not JSON: {exc}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is not an object of lists")
    for name in values:
        if name not in LISTS:
            near = did_you_mean(name, LISTS, otherwise=f"there are: {', '.join(LISTS)}")
            raise InputError(f"{path}: `{name}` is no list of transitions; {near}")
    found: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for name in LISTS:
        for split, items in divided(_list(values, name, path), share).items():
            found[split][name] = items
    return {split: Transitions(items) for split, items in found.items()}


def _list(values: Mapping[str, object], name: str, path: Path) -> list[str]:
    items = values.get(name)
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: `{name}` is not a list of texts")
    for place, item in enumerate(items):
        wrong = not isinstance(item, str) or not item.strip()
        if name == "side" and not wrong:
            question, _, answer = item.partition("=>")
            wrong = not question.strip() or not answer.strip()
        if wrong:
            how = "a question => an answer" if name == "side" else "a text"
            raise InputError(f"{path}: item {place} of `{name}` is not {how}")
        try:
            rows.require_text(item)
        except ValueError as exc:
            raise InputError(f"{path}: item {place} of `{name}`: {exc}") from None
    return list(dict.fromkeys(items))


def divided(items: Sequence[str], share: float) -> dict[str, list[str]]:
    """Return the items of each split."""
    held = max(1, round(share * len(items))) if share > 0 and len(items) >= 3 else 0
    if not held:
        return {split: list(items) for split in SPLITS}
    ranked = sorted(items, key=lambda item: hashlib.blake2b(item.encode()).digest())
    test, dev = set(ranked[:held]), set(ranked[held : 2 * held])
    return {
        "train": [item for item in items if item not in test | dev],
        "dev": [item for item in items if item in dev],
        "test": [item for item in items if item in test],
    }
