"""One dialogue under construction: slices that are laid behind each other, and what goes in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bmkit.data.slices import cut
from bmkit.data.slices.dialogue import Slice, Tag
from bmkit.duplex.chats import Chat, Turn
from bmkit.duplex.speech import Voice
from bmkit.duplex.transitions import Transitions

GAPS = ((0, 1, 2, 3), (20, 45, 20, 15))
"""Silent slices between an answer and the next query, and how often."""


class UnfitError(Exception):
    """A chat can't show an interaction: its answers are too short, or there is no other chat."""


@dataclass
class Scene:
    """What an interaction gets to lay out: a chat, others of the same split, words, a voice."""

    chat: Chat
    others: Sequence[Chat]
    transitions: Transitions
    voice: Voice
    draw: random.Random
    user_words: Sequence[int]
    agent_tokens: int
    slices: list[Slice] = field(default_factory=list)
    used: list[Chat] = field(default_factory=list)
    """The other chats that are in it."""
    synthetic: bool = False
    """Whether an answer stands behind another query than it was written for."""

    def heard(self, text: str) -> list[str]:
        """Return a user's text in slices."""
        return cut.by_words(text, self.user_words, self.draw)

    def said(self, text: str) -> list[str]:
        """Return an agent's text in slices; all but the first of an answer begin with a space."""
        return cut.by_tokens(text, self.agent_tokens)

    def lay(self, user: str | None, agent: str | None, tag: Tag, weight: float = 1.0) -> None:
        """Lay one slice."""
        self.slices.append(Slice(user, agent, tag, weight))

    def listen(self, parts: Sequence[str], tag: Tag = "mid") -> None:
        """Lay slices in which the user speaks and the agent doesn't."""
        for part in parts:
            self.lay(part, None, tag)

    def quiet(self, fewest: int = 0) -> None:
        """Lay slices in which there is nothing to say, `fewest` or more."""
        for _ in range(max(fewest, self.draw.choices(*GAPS)[0])):
            self.lay(None, None, "quiet")

    def go_on(self, pieces: Sequence[str]) -> None:
        """Lay slices in which the agent speaks and the user doesn't."""
        for piece in pieces:
            self.lay(None, piece, "cont")

    def ask(self, text: str, tag: Tag = "mid") -> str:
        """Lay all slices of a query but its last one, and return that."""
        parts = self.heard(text)
        self.listen(parts[:-1], tag)
        return parts[-1]

    def answer(self, last: str | None, pieces: Sequence[str], tag: Tag = "end") -> None:
        """Lay an answer that begins in the slice that ends the query."""
        self.lay(last, pieces[0], tag)
        self.go_on(pieces[1:])

    def plain(self, turn: Turn) -> None:
        """Lay a query and its answer."""
        self.answer(self.ask(self.voice.query(turn.user)), self.said(turn.agent))

    def plainly(self, turns: Sequence[Turn]) -> None:
        """Lay turns with silence behind each."""
        for turn in turns:
            self.plain(turn)
            self.quiet()

    def begun(self, turn: Turn) -> tuple[list[str], list[str]]:
        """Lay a query and the beginning of its answer; return what was said, and what wasn't.

        Raises UnfitError if the answer is said in one slice.
        """
        pieces = self.said(turn.agent)
        if len(pieces) < 2:
            raise UnfitError
        at = self.draw.randrange(1, len(pieces))
        self.answer(self.ask(self.voice.query(turn.user)), pieces[:at])
        return pieces[:at], pieces[at:]

    def place(self, first: int = 0, behind: int = 0) -> int:
        """Return the number of a turn whose answer takes several slices, `behind` turns after it.

        Raises UnfitError if there is none.
        """
        fit = [
            number
            for number, turn in enumerate(self.chat.turns)
            if first <= number < len(self.chat.turns) - behind and len(self.said(turn.agent)) > 1
        ]
        if not fit:
            raise UnfitError
        return self.draw.choice(fit)

    def other(self) -> Chat:
        """Return another chat of the same split. Raises UnfitError if there is none."""
        fit = [chat for chat in self.others if chat.id != self.chat.id and chat not in self.used]
        if not fit:
            raise UnfitError
        self.used.append(self.draw.choice(fit))
        return self.used[-1]

    def words(self, kind: str) -> str:
        """Return a transition as this user says it."""
        return self.voice.said(self.transitions.choice(kind, self.draw))
