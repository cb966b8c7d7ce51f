"""`bmkit duplex chat`: lanes on a terminal, lines without one."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmkit.data.slices import stored
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.stored import Stored
from bmkit.duplex.recipe import DuplexRecipe
from bmkit.duplex.server.live import Live, alone
from bmkit.pipeline import talking
from bmkit.pipeline.stage import Request
from bmkit.report import Silent

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_lines_are_said_and_answers_written(bmkit: Run, listener: Path) -> None:
    done = bmkit("duplex", "chat", "-m", listener, "--threads", 1, stdin="hello\n\nyou there?\n")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines and all(set(line) <= set("de …") and line.startswith("de") for line in lines)


def test_no_line_at_all_is_no_conversation(bmkit: Run, listener: Path) -> None:
    done = bmkit("duplex", "chat", "-m", listener, "--threads", 1, stdin="")
    assert done.returncode == 0 and done.stdout == ""


@pytest.fixture
def talker(tiny: Path) -> Path:
    """A model that hasn't learned anything: it speaks in every slice, and never ends."""
    layout = Layout((250,), (251,), 252, 2)
    stored.write(tiny, Stored("idle", layout, 100, agent_tokens=2, threshold=0.999))
    return tiny


def test_an_answer_that_never_ends_is_left_so_many_slices_behind_the_input(
    bmkit: Run, talker: Path
) -> None:
    words = ("duplex", "chat", "-m", talker, "--threads", 1, "--tail", 5)
    done = bmkit(*words, stdin="hello\n", timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" …\n") and "still speaking 5 slices" in done.stderr


@pytest.mark.parametrize("ends", [True, False])
def test_ctrl_c_ends_an_answer_that_never_ends(talker: Path, tmp_path: Path, ends: bool) -> None:
    command = [sys.executable, "-m", "bmkit_cli", "duplex", "chat", "-m", str(talker), "--plain"]
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(
            [*command, "--threads", "1", "--tail", "100000"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    if ends:
        process.stdin.close()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.stdout.close()
    process.stdin.close()
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said and "Fatal" not in said and "stopped" in said


@pytest.fixture
def live(listener: Path) -> Live:
    """A session of the tiny model with slices of two seconds: time to do something in one."""
    options = ("slice.period_ms=2000",)
    request = Request("duplex", "talk", str(listener), assign=options, threads=1, rows=1)
    prepared = talking.prepare(request, Silent())
    assert isinstance(prepared.recipe, DuplexRecipe)
    return alone(talking.open_sessions(prepared, Silent()), prepared.recipe.policy.interrupt)


def test_words_appear_in_one_lane_and_answers_in_the_other(live: Live) -> None:
    from bmkit_cli.lanes import Lanes, Row

    async def scene() -> None:
        app = Lanes(live)

        def lane(side: int) -> str:
            return "|".join(row.said[side] for row in app.query(Row))

        async def until(what: Callable[[], bool]) -> None:
            for _ in range(600):
                if what():
                    return
                await pilot.pause(0.1)
            raise AssertionError(lane(0) + " / " + lane(1))

        async with app.run_test() as pilot:
            await pilot.press(*"tell me", "space", *"now", "enter")
            await until(lambda: "tell me now" in lane(0).replace("|", " "))
            await until(lambda: "de" in lane(1))
            await pilot.press("escape")
            await until(lambda: "⏹" in lane(1))
            await pilot.press("ctrl+d")
        assert live.closed == "client"

    asyncio.run(asyncio.wait_for(scene(), 120))


def test_typing_while_it_speaks_interrupts_it(live: Live) -> None:
    from bmkit_cli.lanes import Lanes

    async def scene() -> None:
        app = Lanes(live)
        told: list[dict[str, Any]] = []
        say = live.say

        def note(kind: str, /, **values: Any) -> None:
            told.append({"type": kind, **values})
            say(kind, **values)

        live.say = note  # type: ignore[method-assign]
        async with app.run_test() as pilot:
            await pilot.press(*"talk", "enter")
            while not any(e["type"] == "response.speak" for e in told):
                await pilot.pause(0.02)
            start = live.now()
            await pilot.press(*"wait", "enter")
            while not any(e["type"] == "overlap.decision" for e in told):
                await pilot.pause(0.02)
            assert live.now() - start < 1.9  # it hasn't waited for the slice to end
        (decided,) = [e for e in told if e["type"] == "overlap.decision"]
        assert decided["heard"] == "wait"

    asyncio.run(asyncio.wait_for(scene(), 120))
