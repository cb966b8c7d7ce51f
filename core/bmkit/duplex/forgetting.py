"""Forgetting what is oldest of a session, without a slice that takes longer than the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bmkit.data.slices.layout import Layout
from bmkit.duplex.places import Place
from bmkit.duplex.units import Unit, kept, log_of


class Spares(Protocol):
    """Places that no session has."""

    def take(self) -> Place | None:
        """Return one, which is empty; None if there is none now."""

    def give(self, place: Place) -> None:
        """Let others have one."""


@dataclass
class Forgetting:
    """What stays of a session, which is read a little at a time at a spare place.

    Which slices stay, and how many tokens have been read, says what comes next: a session that is
    resumed reads so much at once, and goes on as it would have.
    """

    spares: Spares | None = None
    front: int | None = None
    """The last slice of the beginning that stays; None: nothing is being forgotten."""
    start: int = 0
    """The first slice of the rest that stays."""
    read: int = 0
    """Tokens that have been read."""
    place: Place | None = None

    @property
    def begun(self) -> bool:
        """Tell whether something is being forgotten."""
        return self.front is not None

    def begin(self, layout: Layout, units: Sequence[Unit], *, room: int, sinks: int) -> None:
        """Choose what stays of a session in `room` tokens."""
        stay = {unit.number for unit in kept(layout, units, room=room, sinks=sinks)}
        gone = next((i for i, unit in enumerate(units) if unit.number not in stay), None)
        if gone is None:
            return
        self.front = units[gone - 1].number if gone else -1
        behind = (unit.number for unit in units[gone:] if unit.number in stay)
        self.start = next(behind, units[-1].number + 1)
        self.read = 0

    def stays(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the slices that stay."""
        front = -1 if self.front is None else self.front
        return [unit for unit in units if unit.number <= front or unit.number >= self.start]

    def advance(self, layout: Layout, stay: Sequence[Unit], tokens: int) -> int | None:
        """Read `tokens` more of the slices that stay; return how many are left, None if it can't.

        What ends the last slice isn't read: it is read with the next one.
        """
        if self.place is None and self.spares is not None:
            self.place = self.spares.take()
        if self.place is None:
            return None
        whole = log_of(layout, stay)
        if stay:
            del whole[-len(stay[-1].agent_side(layout)) :]
        wanted = min(self.read + tokens, len(whole))
        shared = common(self.place.ids, whole)
        self.place.cut(shared)
        if shared < wanted:
            self.place.append(whole[shared:wanted])
        self.read = wanted
        return len(whole) - wanted

    def taken(self) -> Place | None:
        """Return the place, if there is one, and be done."""
        place, self.place, self.front = self.place, None, None
        self.start = self.read = 0
        return place

    def give(self, place: Place) -> None:
        """Let others have a place."""
        if self.spares is not None:
            self.spares.give(place)

    def counters(self) -> dict[str, int | None]:
        """Return what is to be known to go on."""
        return {"front": self.front, "start": self.start, "read": self.read}


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
