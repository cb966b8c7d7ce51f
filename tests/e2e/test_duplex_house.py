"""The sessions of one server, in this process: what is on disk, and what was heard."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bmkit.data.slices import stored
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.stored import Stored
from bmkit.duplex.opening import Opened
from bmkit.duplex.recipe import DuplexRecipe
from bmkit.duplex.server.house import House
from bmkit.duplex.server.live import Live
from bmkit.duplex.server.protocol import Refused, understand
from bmkit.pipeline import talking
from bmkit.pipeline.stage import Request
from bmkit.report import Silent

opened_files: list[tuple[Path, str]] = []
"""Each file that was opened, and by which thread."""
_hooked = False


def _note(event: str, words: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(words[0], str):
        opened_files.append((Path(words[0]), threading.current_thread().name))


@pytest.fixture
def opened(listener: Path) -> Iterator[Opened]:
    request = Request("duplex", "talk", str(listener), threads=1, rows=4)
    found: Opened = talking.open_sessions(talking.prepare(request, Silent()), Silent())
    yield found
    found.close()


@pytest.fixture
def endless(tiny: Path) -> Iterator[Opened]:
    """A model that hasn't learned anything: it speaks in every slice, and never ends."""
    layout = Layout((250,), (251,), 252, 2)
    stored.write(tiny, Stored("idle", layout, 100, agent_tokens=4, threshold=0.999))
    found: Opened = talking.open_sessions(
        talking.prepare(Request("duplex", "talk", str(tiny), threads=1, rows=4), Silent()), Silent()
    )
    yield found
    found.close()


async def until(live: Live, reader: int, kind: str) -> list[dict[str, Any]]:
    """Return what is said up to the next event of a type."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["type"] != kind:
        event = await live.out.next(reader)
        assert event is not None
        found.append(event)
    return found


def said(events: list[dict[str, Any]]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def play(opened: Opened, folder: Path, *scenes: Callable[[House], Awaitable[None]]) -> None:
    """Play each scene in a server of its own; the sessions of all are kept in one folder."""

    async def one(scene: Callable[[House], Awaitable[None]]) -> None:
        house = House(opened, DuplexRecipe(kind="duplex").serve, Silent(), folder=folder)
        try:
            await asyncio.wait_for(scene(house), 60)
        finally:
            await house.close()

    for scene in scenes:
        asyncio.run(one(scene))


def nobody(_: int) -> None:
    """Hear of no queue."""


def test_no_file_is_opened_in_the_event_loop(opened: Opened, tmp_path: Path) -> None:
    global _hooked
    if not _hooked:
        sys.addaudithook(_note)  # there is no way to take it back
        _hooked = True
    kept = tmp_path / "kept"
    mine: list[Live] = []

    async def begin(house: House) -> None:
        mine.append(await house.enter(nobody))

    async def resume(house: House) -> None:
        await house.resume(mine[0].id, mine[0].token, 0)

    opened_files.clear()
    play(opened, kept, begin, resume)
    of_sessions = [(file, name) for file, name in opened_files if kept in file.parents]
    assert {file.name for file, _ in of_sessions} >= {"tokens.jsonl", "owner.json", "session.json"}
    main = threading.current_thread().name
    assert not [file for file, name in of_sessions if name == main]


def test_of_two_who_come_back_at_once_one_reads_the_log(opened: Opened, tmp_path: Path) -> None:
    mine: list[Live] = []

    async def begin(house: House) -> None:
        mine.append(await house.enter(nobody))

    async def resume(house: House) -> None:
        name, token = mine[0].id, mine[0].token
        found = await asyncio.gather(*(house.resume(name, token, 0) for _ in range(3)))
        assert len({id(live) for live, _ in found}) == 1
        assert (len(house.seats.free), len(opened.taken)) == (house.spec.max_sessions - 1, 1)
        with pytest.raises(Refused):
            await house.resume(name, "guess", 0)

    play(opened, tmp_path / "kept", begin, resume)


def test_an_answer_goes_on_behind_the_characters_that_were_said_before_a_crash(
    endless: Opened, tmp_path: Path
) -> None:
    kept, later = tmp_path / "kept", tmp_path / "later"
    mine: list[Live] = []
    before: list[dict[str, Any]] = []

    async def begin(house: House) -> None:
        live = await house.enter(nobody)
        mine.append(live)
        reader = live.out.attach()
        live.attached.set()
        for _ in range(4):
            before.extend(await until(live, reader, "slice.stats"))
        live.attached.clear()  # after one more slice it stands still
        before.extend(await until(live, reader, "slice.stats"))
        await asyncio.sleep(0.3)
        assert not live.out.behind
        shutil.copytree(kept, later)  # as a server that was killed here leaves it

    async def resume(house: House) -> None:
        live, _ = await house.resume(mine[0].id, mine[0].token, 0)
        reader = live.out.attach()
        assert live.speaking
        live.attached.set()
        after = await until(live, reader, "slice.stats")
        assert not [e for e in after if e["type"] == "response.speak"]
        deltas = [e for e in after if e["type"] == "response.output_text.delta"]
        assert deltas[0]["response_id"] == "resp_1"
        assert deltas[0]["offset"] == len(said(before)) > 0

    play(endless, kept, begin)
    play(endless, later, resume)


async def hear(live: Live, kind: str, **values: Any) -> None:
    await live.hear(understand(json.dumps({"type": kind, **values})))


def text_of(live: Live, answer: int) -> str:
    """Return what the log has of an answer."""
    units = [unit for unit in live.session.units if unit.answer == answer]
    return str(live.session.tokenizer.decode([i for unit in units for i in unit.agent or ()]))


@pytest.mark.parametrize("acked", [(), (2,), (1, 3), (3, 2), "all"])
def test_of_an_answer_that_is_made_and_still_played_what_was_heard_is_remembered(
    opened: Opened, tmp_path: Path, acked: tuple[int, ...] | str
) -> None:
    async def scene(house: House) -> None:
        live = await house.enter(nobody)
        reader = live.out.attach()
        live.attached.set()
        await hear(live, "input_text.append", text="hello")
        events = await until(live, reader, "response.done")
        whole, done = said(events), events[-1]
        assert (done["status"], done["chars"]) == ("completed", len(whole))
        assert len(whole) > 3 and text_of(live, 1) == whole
        chars = (len(whole),) if isinstance(acked, str) else acked
        for heard in chars:
            await hear(live, "playback.ack", response_id="resp_1", chars=heard)
        await until(live, reader, "slice.stats")
        assert text_of(live, 1) == whole  # nobody has interrupted it
        epoch = live.session.epoch
        await hear(live, "input_text.append", text="wait")
        told = await until(live, reader, "response.speak")
        cut = [e for e in told if e["type"] == "conversation.item.truncated"]
        heard = max(chars, default=len(whole))
        assert text_of(live, 1) == whole[:heard]  # a token is a character
        assert [e["tokens"] for e in cut] == ([len(whole) - heard] if heard < len(whole) else [])
        assert (live.session.epoch > epoch) == bool(cut)

    play(opened, tmp_path / "kept", scene)
