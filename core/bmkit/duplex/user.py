"""A user who follows a script, and reacts to the agent: waits, interrupts, asks again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bmkit.data.slices.dialogue import Dialogue, Slice, Tag
from bmkit.duplex.agents import Session
from bmkit.duplex.metrics import FINISHED, SPOKEN, Conversation, Moment

MOST_TALK = 24
"""Slices after which a user no longer waits for the end of an answer."""
CALM: dict[Tag, Tag] = {"barge": "mid", "side": "end"}
"""What an interruption is when there is nothing left to interrupt."""

Kind = Literal["turn", "stop", "backchannel", "aside"]


@dataclass(frozen=True)
class Act:
    """Something that a user says in one go, or near to it."""

    kind: Kind
    """`aside`: it wants no answer."""
    slices: tuple[tuple[str | None, Tag], ...]
    interrupts: bool
    spoken: int
    """In how many slices the agent has spoken since the last query, before it begins."""
    silent: int
    """Slices of silence before it begins."""
    reference: str = ""
    """What the agent is to answer."""


def script(dialogue: Dialogue) -> list[Act]:
    """Return what a user does in a dialogue, as it is written."""
    acts: list[Act] = []
    spoken = silent = at = 0
    slices = dialogue.slices
    while at < len(slices):
        one = slices[at]
        end = at + 1
        if one.tag in (*SPOKEN, "pause"):
            end = _end_of_turn(slices, at)
        while one.tag == "noise" and end < len(slices) and slices[end].tag == "noise":
            end += 1  # heard in one go
        if one.tag in (*SPOKEN, "pause") or one.user is not None:
            part = slices[at:end]
            kind = _kind(part[-1])
            interrupts = at > 0 and slices[at - 1].agent is not None and one.agent is None
            interrupts = interrupts or kind == "backchannel" or one.tag == "side"
            sides = tuple((s.user, s.tag) for s in part)
            wanted = reference(slices, end - 1) if kind == "turn" else ""
            acts.append(Act(kind, sides, interrupts, spoken, silent, wanted))
            silent = 0
            spoken = spoken if kind == "backchannel" else 0
        last = slices[end - 1]
        spoken += last.agent is not None
        silent = 0 if last.agent is not None or last.user is not None else silent + 1
        at = end
    return acts


def _end_of_turn(slices: Sequence[Slice], start: int) -> int:
    """Return the slice behind the turn that begins at `start`."""
    for at in range(start, len(slices)):
        following = slices[at + 1].tag if at + 1 < len(slices) else None
        tag = slices[at].tag
        if tag in FINISHED or (tag == "stop" and following != "stop"):
            return at + 1
    return len(slices)


def _kind(last: Slice) -> Kind:
    if last.tag in ("stop", "backchannel"):
        return "stop" if last.tag == "stop" else "backchannel"
    return "turn" if last.tag in (*SPOKEN, "pause") else "aside"


def reference(slices: Sequence[Slice], at: int) -> str:
    """Return what the agent says from slice `at` on, until the user takes the word again."""
    said = []
    for number, one in enumerate(slices[at:]):
        if number and one.tag in (*SPOKEN, "pause"):
            break
        said.append(one.agent or "")
    return "".join(said)


class User:
    """Talks to one session. `patience`: slices of silence after which a query is repeated."""

    def __init__(self, session: Session, patience: int) -> None:
        self.session, self.patience = session, patience
        self.moments: list[Moment] = []
        self.references: list[str] = []
        self.repeats = 0
        self.spoken = 0
        """In how many slices the agent has spoken since the last query."""
        self.silent = 0
        """In how many it has been silent since."""

    def follow(self, acts: Sequence[Act]) -> None:
        """Go through a script, and hear the last answer to its end."""
        for act in acts:
            self._perform(act)
        self._hear_out(2)

    def _perform(self, act: Act) -> None:
        if act.interrupts:
            while 0 < self.spoken < act.spoken and self._speaking:
                self._say(None, None)
            if not self._speaking:
                if act.kind in ("stop", "backchannel"):
                    return  # there is nothing to stop, or to nod at
                act = replace(act, slices=tuple((u, CALM.get(t, t)) for u, t in act.slices))
        else:
            self._hear_out(max(act.silent, 1) if self.moments else 0)
        for user, tag in act.slices:
            self._say(user, tag)
        if act.kind != "turn":
            return
        self.spoken = int(self._speaking)
        self.references.append(act.reference)
        if not self._answered():
            self.repeats += 1
            for user, tag in act.slices:
                self._say(user, CALM.get(tag, tag))
            self.spoken = int(self._speaking)
            self.references.append(act.reference)
            self._answered()

    def _answered(self) -> bool:
        """Wait for an answer to what was said just now; tell whether it has begun."""
        for _ in range(self.patience):
            if self._speaking:
                return True
            self._say(None, None)
        return self._speaking

    def _hear_out(self, silent: int) -> None:
        """Listen until the agent has been silent for so many slices."""
        for _ in range(MOST_TALK):
            if self.silent >= silent:
                return
            self._say(None, None)

    @property
    def _speaking(self) -> bool:
        return bool(self.moments) and self.moments[-1].agent is not None

    def _say(self, user: str | None, tag: Tag | None) -> None:
        found = self.session.step(user)
        self.moments.append(Moment(user, found.text, tag, found.p_idle, found.seconds))
        self.spoken += found.speaks
        self.silent = 0 if found.speaks or user is not None else self.silent + 1


def simulated(session: Session, dialogue: Dialogue, patience: int) -> Conversation:
    """Return the conversation of a session with a user who has a dialogue's script."""
    user = User(session, patience)
    user.follow(script(dialogue))
    return Conversation(dialogue.id, tuple(user.moments), tuple(user.references), user.repeats)


def replayed(session: Session, dialogue: Dialogue, window: int) -> Conversation:
    """Return the conversation of a session with a user who speaks as it is written, come what may.

    Silence follows, so that the last words can be answered within `window` slices.
    """
    moments = []
    for one in [*dialogue.slices, *[Slice(None, None, "quiet")] * window]:
        found = session.step(one.user)
        asks = one.user is not None or one.tag == "pause"
        tag = one.tag if asks else None
        moments.append(Moment(one.user, found.text, tag, found.p_idle, found.seconds))
    places = [at for at, one in enumerate(dialogue.slices) if one.tag in FINISHED]
    wanted = tuple(reference(dialogue.slices, at) for at in places)
    return Conversation(dialogue.id, tuple(moments), wanted)
