"""A draft with a tokenizer of its own: text goes between it and the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bmkit.runtime.speculation.draft import Chooser, Draft, Drafted
from bmkit.runtime.speculation.phrases import Phrases
from bmkit.runtime.speculation.policy import Record
from bmkit.runtime.speculation.targets import Target

TAIL = 8
"""Tokens before a guess that are encoded with it: they decide how its beginning is cut."""


class Retokenised(Draft):
    """A draft that reads and says its own tokens, as in universal assisted generation.

    A guess whose text the target would cut otherwise is merely wrong: the target verifies all.
    """

    def __init__(self, model: Target, own: Any, target: Any, *, context: int | None = None) -> None:
        super().__init__(model, phrases=0, context=context)
        self.own, self.target = own, target
        self.right = Record(0.5)
        self.seen: dict[int, int] = {}
        """Of each place, how many of the target's tokens there were at the last guess."""

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.target.decode(list(ids), skip_special_tokens=False))

    def _own(self, ids: Sequence[int]) -> list[int]:
        found: list[int] = self.own(self._text(ids), add_special_tokens=False)["input_ids"]
        return found or [0]

    def begin(self, place: int, ids: Sequence[int], *, slots: int) -> None:
        """Take note of a prompt."""
        self.seen[place] = 0
        super().begin(place, ids, slots=2 * slots + len(ids))

    def unread(self, place: int, said: Sequence[int]) -> int:
        """Return how many of the target's tokens have come since the last guess."""
        return max(len(said) - self.seen.get(place, 0), 1)

    def guess(
        self,
        places: Mapping[int, Sequence[int]],
        choosers: Mapping[int, Chooser | None],
        length: Callable[[int, float], bool],
        sources: Mapping[int, Sequence[Phrases]],
    ) -> dict[int, Drafted]:
        """Guess what follows; the likeliest of its own tokens, whatever the target will draw."""
        own = {p: self._own(said) for p, said in places.items()}
        self.seen |= {p: len(said) for p, said in places.items()}
        found = super().guess(
            own,
            dict.fromkeys(own),
            length,
            {p: () for p in own},
        )
        return {p: self._back(places[p], own[p], drafted) for p, drafted in found.items()}

    def _back(self, said: Sequence[int], own: list[int], drafted: Drafted) -> Drafted:
        """Return a guess in the target's tokens."""
        low = max(0, len(own) - TAIL)
        before = self.own.decode(own[low:], skip_special_tokens=False)
        whole = self.own.decode([*own[low:], *drafted.tokens], skip_special_tokens=False)
        more = whole[len(before) :] if whole.startswith(before) else ""
        tail = list(said[-TAIL:])
        ids = self.target(self._text(tail) + more, add_special_tokens=False)["input_ids"]
        if ids[: len(tail)] == tail:
            tokens = ids[len(tail) :]
        else:
            tokens = self.target(more, add_special_tokens=False)["input_ids"]
        return Drafted(tokens, [self.right] * len(tokens))
