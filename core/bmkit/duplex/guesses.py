"""Guesses at what the agent says next, which are read along with what it has said.

They are phrases that were said before, as in prompt lookup and in arXiv 2402.13720. What the agent
says is chosen as ever, so they change nothing but how many forwards it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmkit.runtime.speculation.phrases import Phrases

AGREE = 2
"""So many tokens before a phrase are the latest ones: one alone is right too seldom."""
REMEMBERED = 2**16
"""Tokens of phrases that a session remembers."""


class Guesses:
    """What was said in a session, and up to `most` tokens of it that may come next."""

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self.phrases = Phrases(limit=REMEMBERED)
        self.tried = self.right = 0
        self._open: list[tuple[int, Tensor]] = []

    def note(self, said: Sequence[int] | None) -> None:
        """Remember what one of both has said."""
        if said and self.most:
            self.phrases.extend(said)
            self.phrases.end()
            self.phrases.trim()

    def after(self, log: Sequence[int], room: int) -> list[int]:
        """Return up to `room` tokens that may follow."""
        most = min(self.most, room)
        found = self.phrases.find(log[-16:], 1) if most > 0 else []
        if not found or found[0][1] < AGREE:
            return []
        return self.phrases.phrase(found[0][0], most)

    def read(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Take guesses that were read: `logits` [tokens, vocabulary] are those behind each."""
        self._open = list(zip(tokens, logits, strict=True))
        self.tried += len(tokens)

    def taken(self, token: int) -> Tensor | None:
        """Return the logits [vocabulary] behind a token, if it was guessed and read."""
        if not self._open or self._open[0][0] != token:
            self._open = []
            return None
        self.right += 1
        return self._open.pop(0)[1]

    def drop(self) -> None:
        """Forget guesses that were read."""
        self._open = []
