"""Places of sessions that a model was opened for, and the spare one that they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bmkit.data.slices import stored
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.stored import Stored
from bmkit.duplex.opening import Opened
from bmkit.duplex.places import TargetPlace
from bmkit.duplex.session import DuplexSession
from bmkit.errors import ResourceError
from bmkit.pipeline import talking
from bmkit.pipeline.stage import Request
from bmkit.report import Silent

Open = Callable[..., Opened]


@pytest.fixture
def opened(tiny: Path) -> Open:
    layout = Layout((250,), (251,), 252, 2)
    stored.write(tiny, Stored("idle", layout, 100, agent_tokens=4, threshold=0.999))

    def make(*assign: str, rows: int = 2) -> Opened:
        request = Request("duplex", "talk", str(tiny), assign=assign, threads=1, rows=rows)
        found: Opened = talking.open_sessions(talking.prepare(request, Silent()), Silent())
        return found

    return make


def number(session: DuplexSession) -> int:
    assert isinstance(session.place, TargetPlace)
    return session.place.number


def test_there_are_as_many_sessions_as_were_asked_for_and_a_spare_place(opened: Open) -> None:
    found = opened()
    first, second = found.session(), found.session()
    with pytest.raises(ResourceError, match="all 2 places"):
        found.session()
    spare = found.take()
    assert spare is not None and found.take() is None
    assert {number(first), number(second), spare.number} == {0, 1, 2}
    with pytest.raises(ResourceError):
        found.session()
    found.end(first)
    third = found.session()
    assert number(third) not in {number(second), spare.number}
    found.give(spare)
    with pytest.raises(ResourceError):
        found.session()
    assert found.take() is not None


@pytest.mark.parametrize("assign", ["kv.eviction=none", "kv.ahead_tokens=0"])
def test_without_forgetting_ahead_there_is_no_spare_place(opened: Open, assign: str) -> None:
    found = opened(assign, rows=1)
    found.session()
    assert found.places == 1 and found.take() is None


def test_a_session_that_ends_while_it_forgets_gives_both_places_back(opened: Open) -> None:
    found = opened("kv.high=120", "kv.low=60", "kv.ahead_tokens=1", rows=1)
    session = found.session()
    for _ in range(40):
        session.step("what is it")
        if session.forgetting.begun:
            break
    assert session.forgetting.place is not None and len(found.taken) == 2
    found.end(session)
    assert not found.taken and found.spare == 0
    again = found.session()
    seen = set()
    for _ in range(60):
        assert len(again.log) <= 120
        again.step("what is it")
        seen.add(number(again))
    assert seen == {0, 1}, "it goes from one place to the other"
    assert again.evicted > 200
