"""Who may talk now, and who waits: first come, first served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Seats:
    """So many places of a model, and a queue of clients in front of them."""

    def __init__(self, places: int, queue: int) -> None:
        self.free = list(range(places))
        self.queue = queue
        self._waiting: list[tuple[asyncio.Future[int], Callable[[int], None]]] = []

    def full(self) -> bool:
        """Tell whether no place is free, nor one in the queue."""
        return not self.free and len(self._waiting) >= self.queue

    @property
    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    async def take(self, tell: Callable[[int], None]) -> int:
        """Return a place, once there is one; `tell` gets the position in the queue meanwhile.

        Raises RuntimeError if the queue is full; who is cancelled leaves it.
        """
        if self.free and not self._waiting:
            return self.free.pop(0)
        if len(self._waiting) >= self.queue:
            raise RuntimeError("the queue is full")
        mine: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        entry = (mine, tell)
        self._waiting.append(entry)
        tell(len(self._waiting))
        try:
            return await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.leave(mine.result())
            raise
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._tell()

    def leave(self, place: int) -> None:
        """Give a place back, to the first who waits."""
        while self._waiting:
            mine, _ = self._waiting.pop(0)
            if not mine.done():
                mine.set_result(place)
                self._tell()
                return
        self.free.append(place)

    def _tell(self) -> None:
        for position, (_, tell) in enumerate(self._waiting, 1):
            tell(position)
