"""A duplex model as one that is measured: sessions with it, and its decisions along a dialogue."""

from __future__ import annotations

import time

from bmkit.data.slices import tokens
from bmkit.data.slices.dialogue import Dialogue
from bmkit.data.slices.layout import Pair, refilled
from bmkit.duplex.agents import Decided, Spoken
from bmkit.duplex.session import DuplexSession


class Subject:
    """A model at one place, which is emptied for each conversation: one is under way at a time."""

    name = "model"
    wordless = False

    def __init__(self, session: DuplexSession) -> None:
        self.place, self.tokenizer, self.layout = session.place, session.tokenizer, session.layout
        self.settings = session.settings

    def _new(self) -> DuplexSession:
        self.place.cut(0)
        return DuplexSession(self.place, self.tokenizer, self.layout, self.settings)

    def open(self) -> Running:
        """Begin a conversation. The one before it is over."""
        return Running(self._new())

    def judge(self, dialogue: Dialogue) -> list[Decided]:
        """Return the decision at each slice of the model's own: `agent_tokens` tokens of an answer.

        What it reads is what a session would have read; whether it waited is not looked at.
        """
        session = self._new()
        pairs = tokens.pairs_of(self.tokenizer, dialogue, self.layout)
        found: list[Decided] = []
        unread = list(self.layout.opening)
        silence = (1.0, True)
        before: Pair | None = None
        for pair in refilled(pairs, self.settings.agent_tokens):
            again = before is not None and before.silent and pair.user is None
            if not (again and self.settings.collapse_idle):  # else nothing new is to be read
                logits = self.place.append([*unread, *self.layout.user_side(pair.user)])
                silence = session.chooser.silence(logits)
            p_idle, likeliest = silence
            speaks = self.settings.policy.decide(p_idle, likeliest=likeliest).speaks
            if pair.weight and pair.tag is not None:
                heard = None if pair.user is None else self.tokenizer.decode(pair.user)
                wanted = pair.agent is not None
                found.append(Decided(pair.tag, wanted, speaks, p_idle, dialogue.id, heard))
            unread = self.layout.agent_side(pair.agent, pair.tag)
            before = pair
        return found


class Running:
    """A session, and how long its slices take."""

    def __init__(self, session: DuplexSession) -> None:
        self.session = session

    def step(self, user: str | None) -> Spoken:
        """Take what the user said in a slice, and answer at its end."""
        start = time.perf_counter()
        found = self.session.step(user)
        seconds = time.perf_counter() - start
        said = found.text if found.decision == "speak" else None
        return Spoken(said, found.p_idle, seconds)
