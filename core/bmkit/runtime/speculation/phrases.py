"""Phrases that were said before: a log of tokens, found again by what stood before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

ORDER = 4
"""The longest run of tokens that the index knows."""
LONGEST = 12
"""How far back a match is followed, to tell long ones from short."""
END = -1
"""Stands between pieces of the log that have nothing to do with each other."""
_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_MASK = 2**32 - 1


class Phrases:
    """An append-only log with, for each run of 1 to ORDER tokens, the places that follow it.

    Places with the same run are chained, the newest first, as compressors of the Lempel-Ziv kind
    do it: three int32 a token and an order, whatever the log's size.
    """

    def __init__(self, *, limit: int = 2**20) -> None:
        self.limit = limit
        self.log: list[int] = []
        self.newest: list[dict[int, int]] = [{} for _ in range(ORDER)]
        self.before: list[list[int]] = [[] for _ in range(ORDER)]

    def __len__(self) -> int:
        """Return the number of tokens, ends of pieces included."""
        return len(self.log)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that follow the last ones."""
        log = self.log
        for token in tokens:
            self._index(len(log))
            log.append(int(token))

    def end(self) -> None:
        """End the piece: what comes next doesn't follow what is there."""
        if self.log and self.log[-1] != END:
            self.extend([END])

    def _index(self, place: int) -> None:
        """Note that at `place` stands what follows the tokens before it."""
        key = 0
        log = self.log
        for order in range(ORDER):
            at = place - 1 - order
            token = log[at] if at >= 0 else END
            if token == END:
                for rest in range(order, ORDER):
                    self.before[rest].append(-1)
                return
            key = (key * _PRIMES[order] + token + 1) & _MASK
            newest = self.newest[order]
            self.before[order].append(newest.get(key, -1))
            newest[key] = place

    def find(self, context: Sequence[int], count: int, *, tries: int = 8) -> list[tuple[int, int]]:
        """Return up to `count` places that follow the end of `context`, with how much agrees.

        The longest agreement first, then the newest; of places that go on with the same token, one.
        """
        keys, key = [], 0
        for order in range(min(ORDER, len(context))):
            key = (key * _PRIMES[order] + context[-1 - order] + 1) & _MASK
            keys.append(key)
        found: list[tuple[int, int]] = []
        nexts: set[int] = set()
        for order in range(len(keys) - 1, -1, -1):
            place = self.newest[order].get(keys[order], -1)
            for _ in range(tries):
                if place < 0 or len(found) >= count:
                    break
                if place < len(self.log) and self.log[place] not in nexts:
                    agree = self._agreement(context, place)
                    if agree > order and self.log[place] != END:
                        nexts.add(self.log[place])
                        found.append((place, agree))
                place = self.before[order][place]
            if len(found) >= count:
                break
        return found

    def _agreement(self, context: Sequence[int], place: int) -> int:
        count = 0
        most = min(LONGEST, len(context), place)
        while count < most and self.log[place - 1 - count] == context[-1 - count]:
            count += 1
        return count

    def phrase(self, place: int, length: int) -> list[int]:
        """Return up to `length` tokens from `place` on, to the end of its piece."""
        found = self.log[place : place + length]
        return found[: found.index(END)] if END in found else found

    def pieces(self) -> Iterator[list[int]]:
        """Yield the pieces of the log."""
        piece: list[int] = []
        for token in self.log:
            if token == END:
                if piece:
                    yield piece
                piece = []
            else:
                piece.append(token)
        if piece:
            yield piece

    def trim(self) -> None:
        """Forget the oldest tokens, if there are more than `limit`."""
        if len(self.log) <= self.limit:
            return
        kept = self.log[-(self.limit * 3 // 4) :]
        limit = self.limit
        self.__init__(limit=limit)  # type: ignore[misc]
        self.extend(kept)

    def tokens(self) -> np.ndarray:
        """Return the log as int32 [tokens]."""
        return np.asarray(self.log, np.int32)
