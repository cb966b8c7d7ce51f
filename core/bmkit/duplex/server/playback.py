"""Which answers a client still plays, and how much of each was heard."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 64
"""Answers that may be unheard."""


@dataclass
class Answer:
    """What the agent is saying, or has said."""

    number: int
    chars: int = 0
    """Characters that were made."""
    heard: int = 0
    """Characters that the client says were heard."""

    @property
    def id(self) -> str:
        """Return the name that clients know it by."""
        return f"resp_{self.number}"


class Playback:
    """The answers that a client plays one behind the other, also when they have long been made.

    A client that has never said what was heard is taken to have heard all.
    """

    def __init__(self) -> None:
        self._told = False
        self._unheard: dict[int, Answer] = {}

    def begin(self, answer: Answer) -> None:
        """Note an answer that the client will play."""
        self._unheard[answer.number] = answer
        if len(self._unheard) > MOST:
            del self._unheard[next(iter(self._unheard))]

    def hear(self, number: int, chars: int) -> None:
        """Note how much of an answer was heard: it never gets less. Those before it are over."""
        self._told = True
        for earlier in [known for known in self._unheard if known < number]:
            del self._unheard[earlier]
        if (answer := self._unheard.get(number)) is not None:
            answer.heard = max(chars, answer.heard)

    def forget(self, number: int) -> None:
        """Forget an answer whose rest was taken back."""
        self._unheard.pop(number, None)

    def cut(self) -> list[Answer]:
        """Return the answers that words of the user cut: those which weren't heard to their end.

        Nothing more of them is played. The latest, if it was heard so far, may go on.
        """
        if not self._told:
            return []
        found = [answer for answer in self._unheard.values() if answer.heard < answer.chars]
        for answer in found:
            self.forget(answer.number)
        return found
