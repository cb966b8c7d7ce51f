"""A session's slices as its token log holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmkit.data.slices.layout import Layout
from bmkit.data.slices.slicer import Words


@dataclass(frozen=True)
class Unit:
    """What both sides said in one slice; None is silence."""

    number: int
    """The slice."""
    user: tuple[int, ...] | None
    agent: tuple[int, ...] | None
    state: int | None = None
    """With the scheme `state`: its token."""
    parts: tuple[Words, ...] = ()
    """The user's words, by what they are revised by."""
    answer: int | None = None
    """Which of the agent's answers it belongs to."""
    before: int = 0
    """Characters of that answer that came before."""

    @property
    def silent(self) -> bool:
        """Tell whether nobody says anything."""
        return self.user is None and self.agent is None

    def agent_side(self, layout: Layout) -> list[int]:
        """Return the agent's tokens with their end."""
        said = list(self.agent or ())
        if self.state is not None:
            return [self.state, *said, layout.end]
        return [*(said or [layout.idle]), layout.end]

    def ids(self, layout: Layout) -> list[int]:
        """Return all tokens."""
        return [*layout.user_side(self.user), *self.agent_side(layout)]

    def silenced(self, layout: Layout) -> Unit:
        """Return it with a silent agent."""
        state = dict(layout.states).get("quiet")
        return Unit(self.number, self.user, None, state, self.parts)

    def values(self) -> dict[str, Any]:
        """Return it as JSON."""
        names = ("number", "user", "agent", "state", "answer", "before")
        found = {name: getattr(self, name) for name in names}
        return {**found, "parts": [[p.key, p.text] for p in self.parts]}


def of_values(values: Mapping[str, Any]) -> Unit:
    """Return the unit of a JSON object. Raises KeyError, TypeError or ValueError for another."""
    sides = [values[side] for side in ("user", "agent")]
    user, agent = (None if side is None else tuple(int(i) for i in side) for side in sides)
    return Unit(
        int(values["number"]),
        user,
        agent,
        values["state"],
        tuple(Words(int(key), str(text)) for key, text in values["parts"]),
        values["answer"],
        int(values["before"]),
    )


def log_of(layout: Layout, units: Sequence[Unit]) -> list[int]:
    """Return the token log of a session."""
    return [*layout.opening, *(token for unit in units for token in unit.ids(layout))]


def kept(layout: Layout, units: Sequence[Unit], *, room: int, sinks: int) -> list[Unit]:
    """Return what is left of a session that may have `room` tokens: whole slices.

    The latest that fit, and those at the beginning that hold its first `sinks` tokens, as attention
    leans on them (arXiv 2309.17453), unless they would take more than half of the room.
    """
    left = room - len(layout.opening)
    sizes = [len(unit.ids(layout)) for unit in units]
    front = held = 0
    while held < sinks and front + 1 < len(units):
        held += sizes[front]
        front += 1
    if held > left // 2:
        front = held = 0
    left -= held
    start = len(units)
    while start > front and sizes[start - 1] <= left:
        start -= 1
        left -= sizes[start]
    return [*units[:front], *units[start:]]
