"""One dialogue under construction: slices that are laid behind each other, and what goes in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bmkit.data.slices import cut
from bmkit.data.slices.dialogue import Slice, Tag
from bmkit.duplex.chats import Chat, Turn
from bmkit.duplex.english import ASKS, COURTESIES
from bmkit.duplex.speech import ENDS, Voice, unpunctuated
from bmkit.duplex.transitions import Transitions

LEADS, TAILS = 0.6, 0.4
"""How often a question is led up to, and followed by a courtesy, where a voice is disfluent."""
PATIENCE = 12
"""Most slices that a user listens to before interrupting."""
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
        """Return a user's text in slices; a courtesy at the end is in none of its own."""
        parts = cut.by_words(text, self.user_words, self.draw)
        if len(parts) > 1 and unpunctuated(parts[-1]) in COURTESIES:
            parts[-2:] = [" ".join(parts[-2:])]
        return parts

    def query(self, turn: Turn) -> str:
        """Return what is asked in a turn, as this user says it: at times with a few words ahead."""
        text = self.voice.query(turn.user)
        if asks(turn.user) and self.draw.random() < self.voice.disfluent * LEADS:
            return self.voice.said(self.voice.joined(self.words("lead"), text))
        return text

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
        """Lay a query and its answer.

        At times a courtesy comes behind the query, when it is being answered: the agent goes on.
        """
        last, pieces = self.ask(self.query(turn)), self.said(turn.agent)
        polite = asks(turn.user) and self.draw.random() < self.voice.disfluent * TAILS
        if not polite or unpunctuated(last).endswith(COURTESIES):
            self.answer(last, pieces)
        elif len(pieces) > 1 and self.draw.random() < 0.5:
            self.lay(last, pieces[0], "end")
            self.lay(self.words("tail"), pieces[1], "backchannel")
            self.go_on(pieces[2:])
        else:
            end = last[-1] if last.endswith(ENDS) else ""
            tail = self.words("tail").rstrip("".join(ENDS))
            comma = "," if self.voice.punctuated else ""
            self.answer(f"{last.removesuffix(end)}{comma} {tail}{end}", pieces)

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
        at = self.draw.randrange(1, min(len(pieces), PATIENCE + 1))
        self.answer(self.ask(self.query(turn)), pieces[:at])
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


def asks(text: str) -> bool:
    """Tell whether a query is a question or a request of one sentence."""
    plain = unpunctuated(text)
    one = not any(mark in text[:-1] for mark in (". ", "? ", "! "))
    return one and len(plain.split()) > 3 and plain.split()[0] in ASKS
