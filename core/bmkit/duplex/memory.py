"""What a session holds: its token log, the cache that holds a prefix of it, and what is forgotten.

The token log is the truth; the cache reads the rest with the next slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock

from torch import Tensor

from bmkit.data.slices.layout import Layout, collapsed
from bmkit.duplex.forgetting import Forgetting, Spares, common
from bmkit.duplex.guesses import Guesses
from bmkit.duplex.places import Place
from bmkit.duplex.settings import Settings
from bmkit.duplex.units import Unit, kept, log_of
from bmkit.errors import ResourceError


class Memory:
    """The log of one conversation, at one place of a model."""

    def __init__(
        self, place: Place, layout: Layout, settings: Settings, spares: Spares | None
    ) -> None:
        self.place, self.layout, self.settings = place, layout, settings
        self.units: list[Unit] = []
        self.log: list[int] = list(layout.opening)
        self.forwards = self.evicted = 0
        self.forgetting = Forgetting(spares)
        self.guesses = Guesses(settings.guesses)
        self._lock = RLock()

    def logits(self) -> Tensor:
        """Return the logits [vocabulary] behind the log, reading what hasn't been read."""
        with self._lock:
            held = len(self.place.ids)
            if held == len(self.log) and self.place.last is not None:
                return self.place.last
            start = min(held, len(self.log) - 1)
            self.place.cut(start)
            self.forwards += 1
            return self.place.append(self.log[start:])

    def _next(self, room: int) -> Tensor:
        """Return the logits behind the log; up to `room` guesses at what follows are read along."""
        found = self.guesses.taken(self.log[-1])
        if found is not None:
            return found
        self.place.cut(len(self.log) - 1)  # guesses that were wrong
        guessed = self.guesses.after(self.log, room)
        if not guessed or not self.place.ids:
            return self.logits()
        self.forwards += 1
        logits = self.place.verify(self.log[len(self.place.ids) :], guessed)
        self.guesses.read(guessed, logits[1:])
        return logits[0]

    def _cut(self, length: int) -> None:
        """Take the log back to `length` tokens."""
        del self.log[length:]
        self.place.cut(length)

    def _rewrite(self, units: Sequence[Unit]) -> None:
        """Let the log be that of `units`; what it shares with the old one needn't be read again."""
        self.units = self._collapsed(units)
        new = log_of(self.layout, self.units)
        self.place.cut(common(self.place.ids, new))
        self.log = new

    def _collapsed(self, units: Sequence[Unit]) -> list[Unit]:
        return list(collapsed(units) if self.settings.collapse_idle else units)

    def _begin(self, unit: Unit) -> int:
        """Let the log end with a unit's user's side; return where that begins."""
        side = self.layout.user_side(unit.user)
        incoming = len(side) + self.settings.agent_tokens + 2
        again = unit.user is None and bool(self.units) and self.units[-1].silent
        most = self.settings.high
        if again and self.settings.collapse_idle:
            tail = len(self.units.pop().agent_side(self.layout))
            del self.log[-tail:]
            self.place.cut(len(self.log))  # as a rule that side hasn't been read
            if not self._forgets_ahead:
                most = self.settings.soon  # now nobody waits
            if len(self.log) + incoming <= most or not self.units or not self.settings.evicts:
                return len(self.log) - len(side)
            del self.log[-len(side) :]
        if len(self.log) + incoming > most and self.units:
            self._evict(incoming)
        self.log += side
        return len(self.log) - len(side)

    def _evict(self, incoming: int) -> None:
        if not self.settings.evicts:
            raise ResourceError(
                f"the session is full: it has {len(self.log)} tokens of {self.settings.high}",
                hint="kv.eviction: window forgets the oldest slices",
            )
        if self.forgetting.begun:  # it hasn't been read to its end
            self._forget()
            if len(self.log) + incoming <= self.settings.high:
                return
        before = len(self.log)
        room = self.settings.low - incoming
        self._rewrite(kept(self.layout, self.units, room=room, sinks=self.settings.sinks))
        self.evicted += before - len(self.log)

    @property
    def _forgets_ahead(self) -> bool:
        settings = self.settings
        return settings.evicts and settings.ahead > 0 and self.forgetting.spares is not None

    def _forget_ahead(self) -> None:
        """Behind a slice: choose what stays if there is much, and read some of it beside the log.

        Once all of it is read, the rest is forgotten.
        """
        if not self._forgets_ahead:
            return
        if not self.forgetting.begun:
            if len(self.log) <= self.settings.soon:
                return
            room, sinks = self.settings.low, self.settings.sinks
            self.forgetting.begin(self.layout, self.units, room=room, sinks=sinks)
        if self.forgetting.begun:
            stay = self._collapsed(self.forgetting.stays(self.units))
            left = self.forgetting.advance(self.layout, stay, self.settings.ahead)
            self.forwards += left is not None
            if left == 0:
                self._forget()

    def _forget(self) -> None:
        """Leave what is being forgotten, and go on at the place where the rest has been read."""
        before = len(self.log)
        units = self.forgetting.stays(self.units)
        place = self.forgetting.taken()
        if place is not None:
            self.place, place = place, self.place
            self.forgetting.give(place)
        self._rewrite(units)
        self.evicted += before - len(self.log)

    def _room_for_user(self) -> int:
        marks = len(self.layout.user) + len(self.layout.agent) + len(self.layout.opening) + 2
        return max(self.settings.low - marks - self.settings.agent_tokens, 1)
