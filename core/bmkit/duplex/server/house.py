"""All sessions of one model: who comes in, who comes back, who has gone."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bmkit.duplex.journal import Journal
from bmkit.duplex.recipe import Serve
from bmkit.duplex.server.live import Live
from bmkit.duplex.server.protocol import Refused
from bmkit.duplex.server.seats import Seats
from bmkit.duplex.session import DuplexSession
from bmkit.errors import BmkitError
from bmkit.report import Reporter

OWNER = "owner.json"
FAREWELL_S = 3.0
"""Seconds that clients have to take what is left for them when the server stops."""
ID = re.compile(r"[0-9a-f]{16}")
Found = TypeVar("Found")


class Model(Protocol):
    """A duplex model with places for several sessions: `bmkit.duplex.opening.Opened`."""

    period_ms: int

    def session(self) -> DuplexSession:
        """Return a new session at a free place."""

    def end(self, session: DuplexSession) -> None:
        """Give a session's place to others."""

    def head(self) -> Mapping[str, Any]:
        """Return what a stored session is compared by."""


class _Held:
    """A place that was taken for a session which isn't running yet."""

    live: Live | None = None


class House:
    """The sessions of one server. One thread runs the model, so one forward goes at a time."""

    def __init__(
        self,
        model: Model,
        spec: Serve,
        reporter: Reporter,
        *,
        interrupt: str = "immediate",
        folder: Path | None = None,
    ) -> None:
        self.model, self.spec, self.reporter = model, spec, reporter
        self.interrupt, self.folder = interrupt, folder
        self.seats = Seats(spec.max_sessions, spec.queue)
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.lives: dict[str, Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closing = False
        self._senders: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Lock()
        """Held while a session comes from disk: two clients never write to one file."""

    async def enter(self, tell: Callable[[int], None]) -> Live:
        """Begin a session once there is a place for it. Raises Refused if the queue is full."""
        place = await self._place(tell)
        with self._held(place) as held:
            live = held.live = self._live(secrets.token_hex(8))
            if (kept := self.folder) is not None:
                live.journal = await _in_thread(lambda: self._begun(kept / live.id, live))
        return self._start(live, place)

    def _begun(self, folder: Path, live: Live) -> Journal:
        found = Journal.begin(folder, live.session, self.model.head())
        _write_owner(folder, live.token)
        return found

    @contextmanager
    def _held(self, place: int) -> Iterator[_Held]:
        """Give a place back if a session can't be begun in it. Raises Refused for why it can't."""
        held = _Held()
        begun = False
        try:
            yield held
            begun = True
        except (BmkitError, OSError) as exc:
            self.reporter.warn(f"a session couldn't be begun: {exc}")
            raise Refused("cannot_begin", str(exc)) from None
        finally:
            if not begun:
                if held.live is not None:
                    self.model.end(held.live.session)
                self.seats.leave(place)

    async def _place(self, tell: Callable[[int], None]) -> int:
        self._require_open()
        self.make_room(1)
        if self.seats.full():
            raise Refused("busy", "all sessions are taken, and the queue is full")
        return await self.seats.take(tell)

    def make_room(self, more: int = 0) -> None:
        """End sessions that are kept on disk and whose clients have gone, for those who wait.

        There are `more` of these than the queue holds. Who was gone longest goes first.
        """
        wanted = self.seats.waiting + more - len(self.seats.free)
        wanted -= sum(live.closed is not None for live in self.lives.values())
        left = [
            live
            for live in self.lives.values()
            if live.journal is not None and live.closed is None and not live.attached.is_set()
        ]
        for live in sorted(left, key=lambda live: live.left)[: max(wanted, 0)]:
            live.close("made_room")

    def _require_open(self) -> None:
        if self.closing:
            raise Refused("shutdown", "the server is being stopped")

    def _live(self, name: str) -> Live:
        session = self.model.session()
        return Live(name, session, self.executor, self.model.period_ms, self.interrupt)

    def _start(self, live: Live, place: int) -> Live:
        self.lives[live.id] = live
        task = asyncio.get_running_loop().create_task(self._run(live, place))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self.closing:
            live.close("shutdown")
        return live

    def sends(self, sender: asyncio.Task[None]) -> None:
        """Wait for a task that tells a client what is said, when the server stops."""
        self._senders.add(sender)
        sender.add_done_callback(self._senders.discard)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Tell of a session that a bug has ended: the others go on."""
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            where = "".join(traceback.format_exception(bug))
            self.reporter.warn(f"a session was ended by a bug of bmkit:\n{where}")

    async def _run(self, live: Live, place: int) -> None:
        watch = asyncio.get_running_loop().create_task(self._watch(live))
        try:
            await live.run()
        except BmkitError as exc:
            self.reporter.warn(f"session {live.id} has ended: {exc}")
            live.say("error", code="failed", message=str(exc))
            live.close("failed")
        finally:
            if live.closed is None:  # a bug, which is told below; the client is told as well
                live.close("failed")
            watch.cancel()
            if self.lives.get(live.id) is live:
                del self.lives[live.id]
            self.model.end(live.session)
            self.seats.leave(place)
            if live.journal is not None:
                live.journal.close()
            live.ended.set()

    async def _watch(self, live: Live) -> None:
        """End a session in which nobody says anything."""
        limit = self.spec.idle_timeout_s
        while live.closed is None:
            left = live.last_word + limit - live.now()
            if left <= 0:
                live.close("idle_timeout")
                return
            await asyncio.sleep(left)

    async def resume(
        self, name: str, token: str, after: int, *, instead: Live | None = None
    ) -> tuple[Live, bool]:
        """Return a session that a client comes back to, and whether it can be told all it missed.

        `instead` is the one that was begun for it meanwhile, which ends.
        Raises Refused if there is none, or the token isn't its own.
        """
        self._require_open()
        if not ID.fullmatch(name):
            raise _unknown()
        live = self.lives.get(name)
        if live is not None and live.closed is None:
            return self._back(live, token, after, instead)
        async with self._reading:
            return await self._read(name, token, after, instead)

    def _back(self, live: Live, token: str, after: int, instead: Live | None) -> tuple[Live, bool]:
        """Return a session that runs."""
        if not hmac.compare_digest(live.token.encode(), token.encode()):
            raise _unknown()
        live.last_word = live.now()
        if instead is not None:
            instead.close("client")
        return live, live.out.rewind(after)

    async def _read(
        self, name: str, token: str, after: int, instead: Live | None
    ) -> tuple[Live, bool]:
        """Return a session that is on disk, unless another client has brought it back meanwhile."""
        live = self.lives.get(name)
        if live is not None and live.closed is None:
            return self._back(live, token, after, instead)
        if live is not None:  # it is ending: its last slice is being written
            await live.ended.wait()
        folder = None if self.folder is None else self.folder / name
        if folder is None or not await _in_thread(lambda: _owns(folder, token)):
            raise _unknown()
        if instead is not None:
            instead.close("client")
            await instead.ended.wait()  # its place is free then
        self.make_room(1)
        for ending in [live for live in self.lives.values() if live.closed is not None]:
            if not self.seats.free:
                await ending.ended.wait()
        if not self.seats.free:
            raise Refused("busy", "all sessions are taken: come back later")
        place = await self.seats.take(lambda _: None)
        with self._held(place) as held:
            found = held.live = self._live(name)
            found.token = token
            session, head = found.session, self.model.head()
            found.journal = await _in_thread(lambda: Journal.resume(folder, session, head))
            found.resumed()
        return self._start(found, place), False

    async def farewell(self) -> None:
        """Let nobody in any more, end all sessions, and wait until their clients were told so.

        That takes `FAREWELL_S` seconds at the most, whether or not they read.
        """
        self.closing = True
        for live in list(self.lives.values()):
            live.close("shutdown")
        if self._senders:
            await asyncio.wait(self._senders, timeout=FAREWELL_S)

    async def close(self) -> None:
        """End all sessions, and wait until the model has stopped."""
        await self.farewell()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*self._tasks, return_exceptions=True), 10)
        self.executor.shutdown(wait=False, cancel_futures=True)


def _unknown() -> Refused:
    return Refused("unknown_session", "there is no such session, or it isn't yours")


async def _in_thread(task: Callable[[], Found]) -> Found:
    """Do what waits for the disk beside the event loop; who is cancelled waits for its end.

    It isn't the model's thread: other sessions go on meanwhile.
    """
    work = asyncio.ensure_future(asyncio.to_thread(task))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        with suppress(BmkitError, OSError):
            await work
        raise


def _write_owner(folder: Path, token: str) -> None:
    text = json.dumps({"token": hashlib.sha256(token.encode()).hexdigest()}) + "\n"
    (folder / OWNER).write_text(text, encoding="utf-8")


def _owns(folder: Path, token: str) -> bool:
    try:
        said = json.loads((folder / OWNER).read_text(encoding="utf-8"))["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return hmac.compare_digest(hashlib.sha256(token.encode()).hexdigest(), str(said))
