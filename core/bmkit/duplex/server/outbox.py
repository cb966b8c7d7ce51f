"""What the server has said to one client: numbered, and kept for a while."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

KEPT = 4096
"""Events that a client which comes back can be told again."""

Message = dict[str, Any]


class Outbox:
    """The events of one session, in order. One reader at a time.

    What is said while nobody reads is kept like all else.
    """

    def __init__(self) -> None:
        self.seq = 0
        """The number of the last event."""
        self._kept: deque[Message] = deque(maxlen=KEPT)
        self._sent = 0
        self._more = asyncio.Event()
        self.reader = 0
        """Who reads now."""

    def say(self, message: Message) -> None:
        """Add an event; it gets the next number."""
        self.seq += 1
        self._kept.append({**message, "seq": self.seq})
        self._more.set()

    @property
    def behind(self) -> int:
        """Return how many events wait."""
        return self.seq - self._sent

    def rewind(self, after: int) -> bool:
        """Send what came after an event again; tell whether all of that is still there."""
        if after > self.seq:  # numbers of a server that is gone
            self._sent = 0
            return False
        oldest = self._kept[0]["seq"] if self._kept else self.seq + 1
        self._sent = min(max(after, oldest - 1), self.seq)
        self._more.set()
        return after >= oldest - 1

    def attach(self) -> int:
        """Begin to read; who has read before gets nothing more."""
        self.reader += 1
        self._more.set()
        return self.reader

    async def next(self, reader: int) -> Message | None:
        """Wait for the next event; None once another reader has begun."""
        while True:
            if reader != self.reader:
                return None
            if self._sent < self.seq:
                oldest = int(self._kept[0]["seq"])
                self._sent = max(self._sent, oldest - 1) + 1
                return self._kept[self._sent - oldest]
            self._more.clear()
            await self._more.wait()
