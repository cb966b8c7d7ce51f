"""How often values come again among very many of them, in bounded memory."""

from __future__ import annotations

import hashlib


class Sketch:
    """A sample of values by their hashes: half of it goes, and no more than half comes, when full.

    What is in it is in it each time that it comes, so that shares of repeated values are those of
    all values, but for the error of a sample of `size / 2` or more. Exact up to `size` values.
    """

    def __init__(self, size: int = 50_000) -> None:
        self.size = size
        self._bits = 0
        self._counts: dict[int, int] = {}

    def add(self, value: str) -> None:
        """Note a value."""
        found = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest())
        if found & self._mask:
            return
        self._counts[found] = self._counts.get(found, 0) + 1
        while len(self._counts) > self.size:
            self._bits += 1
            self._counts = {k: n for k, n in self._counts.items() if not k & self._mask}

    @property
    def _mask(self) -> int:
        return (1 << self._bits) - 1

    @property
    def repeated(self) -> float:
        """Return the share of values that were there before."""
        total = sum(self._counts.values())
        return 1 - len(self._counts) / total if total else 0.0

    def shared(self, other: Sketch) -> float:
        """Return the share of these values, each counted once, that the other has as well."""
        mask = self._mask | other._mask
        mine = [value for value in self._counts if not value & mask]
        return sum(value in other._counts for value in mine) / len(mine) if mine else 0.0
