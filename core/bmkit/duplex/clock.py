"""Clocks that a session runs by: the machine's, and one that stands still until it is set."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Says how late it is, and waits."""

    def now(self) -> int:
        """Return the milliseconds since it was started: never fewer than before."""

    def wait_until(self, ms: int) -> int:
        """Return once it is as late; return by how many milliseconds it is later than that."""


class WallClock:
    """The machine's, which doesn't go back when the time of day does."""

    def __init__(self) -> None:
        self._start = time.monotonic_ns()

    def now(self) -> int:
        """Return the milliseconds since it was started."""
        return (time.monotonic_ns() - self._start) // 1_000_000

    def wait_until(self, ms: int) -> int:
        """Sleep; return by how many milliseconds it is too late."""
        left = ms - self.now()
        if left > 0:
            time.sleep(left / 1000)
        return max(self.now() - ms, 0)


class VirtualClock:
    """One on which computing takes no time: a replay is the same on any machine."""

    def __init__(self) -> None:
        self._now = 0

    def now(self) -> int:
        """Return the milliseconds that were waited for."""
        return self._now

    def wait_until(self, ms: int) -> int:
        """Set it, if that is not in the past; return by how much it is."""
        late = max(self._now - ms, 0)
        self._now = max(self._now, ms)
        return late
