"""Where units are: on the device for good, or brought there from RAM or disk ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bmkit.runtime.cpu.store import Load, Order, Sized, Store
from bmkit.runtime.cpu.window import Window
from bmkit.runtime.placed.link import CudaLink, Link, ThreadLink


class Tiers(Protocol):
    """The slabs of a model's units, on its device."""

    def use(self, unit: int) -> AbstractContextManager[Tensor]:
        """Give a unit's slab while the block runs."""

    def resident(self) -> dict[int, Tensor]:
        """Return the slabs of the units that stay."""

    def close(self) -> None:
        """Stop reading and copying."""


class InMemory:
    """The CPU is the device: streamed units come from disk."""

    def __init__(
        self,
        units: Sequence[Sized],
        load: Load,
        *,
        resident: set[int],
        windows: Mapping[int, Window] | None = None,
        slots: int = 2,
    ) -> None:
        self.store = Store(units, load, resident=resident, windows=windows, slots=slots)

    @contextmanager
    def use(self, unit: int) -> Iterator[Tensor]:
        """Give a unit's slab, waiting until it has been read."""
        with self.store.use(unit) as slab:
            yield torch.from_numpy(slab)

    def resident(self) -> dict[int, Tensor]:
        """Return the slabs of the units that stay."""
        return {i: torch.from_numpy(slab) for i, slab in self.store.resident.items()}

    def close(self) -> None:
        """Stop reading."""
        self.store.close()


class OnDevice:
    """A device with memory of its own: streamed units are copied there from RAM.

    `in_ram` units wait in RAM; the others are read from disk into RAM first. Slots on the device
    are copied into as soon as the computing that used them is over, which events say both ways; the
    processor waits for nothing but the disk.
    """

    def __init__(
        self,
        link: Link,
        units: Sequence[Sized],
        load: Load,
        *,
        resident: set[int],
        in_ram: set[int],
        slots: int = 2,
    ) -> None:
        self.link, self.units = link, units
        streamed = [i for i in range(len(units)) if i not in resident]
        self.on_device = {i: self._upload(i, load) for i in sorted(resident)}
        waiting = [i for i in streamed if i in in_ram]
        place = link.host(sum(units[i].bytes for i in waiting))
        self.in_ram: dict[int, np.ndarray] = {}
        end = 0
        for i in waiting:
            self.in_ram[i] = place[end : end + units[i].bytes]
            load(i, self.in_ram[i])
            end += units[i].bytes
        on_disk = [i for i in streamed if i not in in_ram]
        self.disk = Store(units, load, resident=set(), streamed=on_disk, slots=3, make=link.host)
        self.order = Order(streamed)
        size = max((units[i].bytes for i in streamed), default=0)
        self.slots = [link.empty(size) for _ in range(min(slots, len(streamed)))]
        self.used: list[Any] = [
            link.mark() for _ in self.slots
        ]  # they may have been others' before
        self.held: dict[int, tuple[int, Any]] = {}  # unit -> slot, event of its copy
        self.free = list(range(len(self.slots)))
        self.reading: list[tuple[AbstractContextManager[Any], Any]] = []
        self.copied_bytes = 0
        for i in streamed[: len(self.slots)]:
            self._fetch(i)

    def _upload(self, unit: int, load: Load) -> Tensor:
        bounce = np.empty(self.units[unit].bytes, np.uint8)
        load(unit, bounce)
        target = self.link.empty(self.units[unit].bytes)
        target.copy_(torch.from_numpy(bounce))
        return target

    def _fetch(self, unit: int) -> None:
        slot = self.free.pop(0)
        target = self.slots[slot][: self.units[unit].bytes]
        if unit in self.in_ram:
            event = self.link.copy(self.in_ram[unit], target, self.used[slot])
        else:
            while self.reading:  # a slab of the disk's store is free again when its copy is over
                manager, copied = self.reading.pop(0)
                self.link.wait(copied)
                manager.__exit__(None, None, None)
            manager = self.disk.use(unit)
            slab = manager.__enter__()
            event = self.link.copy(slab[: self.units[unit].bytes], target, self.used[slot])
            self.reading.append((manager, event))
        self.copied_bytes += self.units[unit].bytes
        self.held[unit] = (slot, event)

    @contextmanager
    def use(self, unit: int) -> Iterator[Tensor]:
        """Give a unit's slab; what is computed with it begins when its copy has come."""
        if unit in self.on_device:
            yield self.on_device[unit]
            return
        self.order.used(unit)
        if unit not in self.held:
            if not self.free:  # another order than foreseen: give the oldest up
                other = next(iter(self.held))
                slot, event = self.held.pop(other)
                self.used[slot] = event
                self.free.append(slot)
            self._fetch(unit)
        slot, event = self.held[unit]
        self.link.order(event)
        try:
            yield self.slots[slot]
        finally:
            self.used[slot] = self.link.mark()
            del self.held[unit]
            self.free.append(slot)
            following = self.order.following(unit, self.held)
            if following is not None and following not in self.on_device:
                self._fetch(following)

    def resident(self) -> dict[int, Tensor]:
        """Return the slabs of the units that stay."""
        return self.on_device

    def close(self) -> None:
        """End what is under way."""
        for manager, event in self.reading:
            self.link.wait(event)
            manager.__exit__(None, None, None)
        self.reading.clear()
        self.disk.close()
        if isinstance(self.link, (CudaLink, ThreadLink)):
            self.link.close()
