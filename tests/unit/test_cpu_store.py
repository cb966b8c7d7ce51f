"""The store of weights: units come whole, in any order of use, in no more memory than planned."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmkit.errors import InputError
from bmkit.runtime.budget import spread
from bmkit.runtime.cpu.dots import FLOAT32
from bmkit.runtime.cpu.pack import Shape, lay_out
from bmkit.runtime.cpu.store import Store

SIZES = [3, 1, 4, 1, 5, 9, 2]
LAYOUTS = [lay_out([Shape(FLOAT32, rows, 32)]) for rows in SIZES]


def fill(unit: int, slab: np.ndarray) -> None:
    """Write the unit's number everywhere, not at once."""
    time.sleep(0.0005)
    slab[:] = unit + 1


@given(
    resident=st.sets(st.integers(0, 6)),
    order=st.lists(st.integers(0, 6), max_size=30),
    slots=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_unit_is_whole_whatever_the_order(
    resident: set[int], order: list[int], slots: int
) -> None:
    store = Store(LAYOUTS, fill, resident=resident, slots=slots)
    for unit in [*order, *range(7), *range(7)]:
        with store.use(unit) as slab:
            part = slab[: LAYOUTS[unit].bytes]
            assert (part == unit + 1).all()
            time.sleep(0.0002)
            assert (part == unit + 1).all(), "somebody wrote into a slab in use"
    left = [i for i in range(7) if i not in resident]
    most = max((LAYOUTS[i].bytes for i in left), default=0)
    kept = sum(LAYOUTS[i].bytes for i in resident)
    assert store.bytes == kept + min(slots, len(left)) * most
    store.close()


def test_the_next_unit_is_read_while_one_is_in_use() -> None:
    begun: list[int] = []
    second = threading.Event()

    def load(unit: int, slab: np.ndarray) -> None:
        begun.append(unit)
        if len(begun) > 1:
            second.set()

    store = Store(LAYOUTS, load, resident=set())
    with store.use(0):
        assert second.wait(5), "nothing is read ahead"
    with store.use(6) as _, store.use(0):
        pass
    store.close()


def test_the_beginning_is_read_while_the_end_is_in_use() -> None:
    read: list[int] = []

    def load(unit: int, slab: np.ndarray) -> None:
        read.append(unit)

    store = Store(LAYOUTS, load, resident=set())
    for unit in range(7):
        with store.use(unit):
            pass
    deadline = time.monotonic() + 5
    while len(read) < 9 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert read == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    store.close()


def test_what_fails_in_the_reader_is_raised_where_the_unit_is_used() -> None:
    def load(unit: int, slab: np.ndarray) -> None:
        if unit == 2:
            raise InputError("the file has become shorter")

    store = Store(LAYOUTS, load, resident=set())
    with pytest.raises(InputError, match="shorter"):
        for unit in range(7):
            with store.use(unit):
                pass


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(0, 300))
def test_residents_fit_and_lie_apart(sizes: list[int], room: int) -> None:
    chosen = spread(tuple(sizes), room)
    assert sum(sizes[i] for i in chosen) <= room
    if sum(sizes) <= room:
        assert chosen == set(range(len(sizes)))
    order = sorted(chosen)
    gaps = [b - a for a, b in itertools.pairwise(order)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_reader_computes_alone_and_others_as_before() -> None:
    """A second team of OpenMP threads would hold up all barriers of the first."""
    found: list[int] = []

    def load(unit: int, slab: np.ndarray) -> None:
        found.append(torch.get_num_threads())
        slab[:] = unit

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        store = Store(LAYOUTS, load, resident=set())
        with store.use(0):
            pass
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        store.close()
        assert set(found) == {1}
        assert torch.get_num_threads() == 2
        assert later == [2]
    finally:
        torch.set_num_threads(before)
