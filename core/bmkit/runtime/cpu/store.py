"""Units of weights, resident or streamed: a reader thread fills slots ahead of their use."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from bmkit.runtime.cpu.pack import empty_slab
from bmkit.runtime.cpu.window import Window

Load = Callable[[int, np.ndarray], None]
"""Write unit i into a slab of its size."""


class Sized(Protocol):
    """What a store must know of a unit."""

    @property
    def bytes(self) -> int:
        """Return what it takes in a slab."""


class Order:
    """In which order units are used: round in a ring at first, then as they were last time.

    What comes after a unit depends on the one before it: gradients go the way back, and a decoder
    with an encoder before it goes through the encoder once and through itself many times.
    """

    def __init__(self, units: Sequence[int]) -> None:
        self.ring = dict(zip(units, [*units[1:], *units[:1]], strict=True))
        self.after: dict[tuple[int | None, int], int] = {}
        self.last: tuple[int | None, int] | None = None

    def used(self, unit: int) -> None:
        """Take notice that `unit` is used now."""
        if self.last is None:
            self.last = (None, unit)
        elif self.last[1] != unit:
            self.after[self.last] = unit
            self.last = (self.last[1], unit)

    def following(self, unit: int, held: Container[int]) -> int | None:
        """Return the next unit after `unit`, in use now, that isn't held; None if all are."""
        before = self.last[0] if self.last is not None and self.last[1] == unit else None
        seen = set()
        while (before, unit) not in seen:
            seen.add((before, unit))
            before, unit = unit, self.after.get((before, unit), self.ring[unit])
            if unit not in held:
                return unit
        return None


class Store:
    """The units of a model, used one after the other, over and over.

    Those in `resident` are loaded once. The others share `slots` slabs: while one is in use, a
    thread reads what comes next, round the end to the beginning, so that the first unit of the next
    token is read while the last of this one is computed. `streamed` are all the others, if not
    given; those that have one of `windows` are mapped instead of read. `make` makes the slabs. Peak
    memory: residents and slots, nothing else.
    """

    def __init__(
        self,
        layouts: Sequence[Sized],
        load: Load,
        *,
        resident: set[int],
        streamed: Sequence[int] | None = None,
        windows: Mapping[int, Window] | None = None,
        slots: int = 2,
        make: Callable[[int], np.ndarray] = empty_slab,
    ) -> None:
        self.windows = windows or {}
        self.layouts, self.load = layouts, load
        self.resident = {i: empty_slab(layouts[i].bytes) for i in sorted(resident)}
        for i, slab in self.resident.items():
            load(i, slab)
        others = [i for i in range(len(layouts)) if i not in resident]
        self.streamed = others if streamed is None else list(streamed)
        self.order = Order(self.streamed)
        size = max((layouts[i].bytes for i in self.streamed if i not in self.windows), default=0)
        count = min(slots, len(self.streamed))
        self.slots = [make(size) for _ in range(count)]
        self.held: dict[int, int] = {}  # unit -> slot, wanted or there
        self.ready: set[int] = set()
        self.free = list(range(count))
        self.wanted: list[int] = []
        self.failed: BaseException | None = None
        self.closed = False
        self.change = threading.Condition()
        self.bytes_read = 0
        self.begun = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True, name="weights")
        if count:
            threads = torch.get_num_threads()
            self.reader.start()
            self.begun.wait()
            torch.set_num_threads(threads)  # what threads begin with that are made later
            # A thread that is in a library's code when Python ends would abort the process.
            atexit.register(self.close)
            with self.change:
                for unit in self.streamed[:count]:
                    self._ask(unit)

    @property
    def bytes(self) -> int:
        """Return the memory that is held."""
        return sum(s.nbytes for s in (*self.resident.values(), *self.slots))

    @contextmanager
    def use(self, unit: int) -> Iterator[np.ndarray]:
        """Give the slab of `unit`, waiting until it is there; then let its slot go."""
        if unit in self.resident:
            yield self.resident[unit]
            return
        with self.change:
            self.order.used(unit)
            if unit not in self.held:
                self._make_room()
                self._ask(unit)
            while unit not in self.ready and self.failed is None:
                self.change.wait()
            if self.failed is not None:
                raise self.failed
            slot = self.held[unit]
        try:
            yield self.windows[unit].array if unit in self.windows else self.slots[slot]
        finally:
            if unit in self.windows:
                self.windows[unit].drop()
            with self.change:
                self.ready.discard(unit)
                del self.held[unit]
                self.free.append(slot)
                if (following := self.order.following(unit, self.held)) is not None:
                    self._ask(following)

    def close(self) -> None:
        """Stop reading ahead."""
        with self.change:
            self.closed = True
            self.change.notify_all()
        if self.reader.is_alive():
            self.reader.join()
        atexit.unregister(self.close)

    def _ask(self, unit: int) -> None:
        if self.free and unit not in self.held:
            self.held[unit] = self.free.pop()
            self.wanted.append(unit)
            self.change.notify_all()

    def _make_room(self) -> None:
        """Give up a unit that was read ahead and isn't the one that is needed."""
        while not self.free:
            given_up = next((u for u in self.ready), None)
            if given_up is not None:
                self.ready.discard(given_up)
                if given_up in self.windows:
                    self.windows[given_up].drop()
                self.free.append(self.held.pop(given_up))
            elif self.failed is not None:
                raise self.failed
            else:
                self.change.wait()

    def _read(self) -> None:
        # A second team of OpenMP threads would make those of both yield at each barrier.
        torch.get_num_threads()  # the first call in a thread sets it to what all have
        torch.set_num_threads(1)
        self.begun.set()
        while True:
            with self.change:
                while not self.wanted and not self.closed:
                    self.change.wait()
                if self.closed:
                    return
                unit = self.wanted.pop(0)
                slot = self.held[unit]
                following = self.order.following(unit, self.held)
            for soon in (unit, following):  # the disk goes on with one that has no slot yet
                if soon is not None and soon in self.windows:
                    self.windows[soon].ahead()
            try:
                if unit in self.windows:
                    self.windows[unit].fill()
                else:
                    self.load(unit, self.slots[slot][: self.layouts[unit].bytes])
            except BaseException as exc:
                with self.change:
                    self.failed = exc
                    self.change.notify_all()
                return
            with self.change:
                self.bytes_read += self.layouts[unit].bytes
                self.ready.add(unit)
                self.change.notify_all()
