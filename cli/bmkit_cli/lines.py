"""A duplex session line by line: lines of stdin are said, what the model says is written."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


async def talk(
    live: Any,
    write: Callable[[str], None],
    *,
    linger: int,
    tail: int,
    warn: Callable[[str], None] = lambda _: None,
) -> bool:
    """Say each line that comes; write answers as they are made, each on a line of its own.

    Ends `linger` silent slices after the input has ended and the last answer is over, or `tail`
    slices after the input whatever the model does. Returns whether it was still speaking then.
    `warn` is told of words that didn't fit.
    """
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str | None] = asyncio.Queue()

    # A buffer of its own: Python aborts at its end if a thread waits in that of `sys.stdin`.
    given = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 - as long as the process

    def read() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            for line in given:
                loop.call_soon_threadsafe(lines.put_nowait, line.decode(errors="replace"))
            loop.call_soon_threadsafe(lines.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    live.attached.set()
    ended = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = [
        loop.create_task(live.run()),
        loop.create_task(_say(live, lines, ended)),
        loop.create_task(_show(live, write, ended, (linger, tail), warn)),
    ]
    shown = tasks[-1]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        live.close("client")
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return bool(shown.result())


async def _say(live: Any, lines: asyncio.Queue[str | None], ended: asyncio.Event) -> None:
    from bmkit.duplex.server.protocol import MAX_TEXT, Append

    while (line := await lines.get()) is not None:
        text = line.strip()
        for at in range(0, len(text), MAX_TEXT):
            while live.words and live.closed is None:
                await asyncio.sleep(0.02)  # a slice takes one line
            await live.hear(Append(type="input_text.append", text=text[at : at + MAX_TEXT]))
    ended.set()


async def _show(
    live: Any,
    write: Callable[[str], None],
    ended: asyncio.Event,
    patience: tuple[int, int],
    warn: Callable[[str], None],
) -> bool:
    linger, tail = patience
    reader = live.out.attach()
    speaks, silent, behind = False, 0, 0
    while (event := await live.out.next(reader)) is not None:
        kind = event["type"]
        over = ended.is_set() and not live.words
        if kind == "response.output_text.delta":
            write(event["delta"] if speaks else event["delta"].lstrip())
            speaks, silent = True, 0
        elif kind == "response.done":
            write(" …\n" if event["status"] == "interrupted" else "\n")
            speaks = False
        elif kind == "response.listen":
            silent = silent + 1 if over else 0
            if silent > linger:
                live.close("client")
        elif kind == "slice.stats":
            if event.get("cut"):
                warn(f"the first {event['cut']} tokens of what was said didn't fit: see kv.high")
            behind = behind + 1 if over else 0
            if behind >= tail:
                live.close("client")
        elif kind == "session.closed":
            if speaks:
                write(" …\n")
            return speaks
    return speaks
