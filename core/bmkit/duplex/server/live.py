"""One session that runs by the clock: words come in at any time, a slice is made at each tick."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bmkit.data.slices.slicer import Words, joined
from bmkit.duplex.agent import AgentSlice
from bmkit.duplex.journal import Journal
from bmkit.duplex.server import protocol
from bmkit.duplex.server.outbox import Outbox
from bmkit.duplex.server.playback import Answer, Playback
from bmkit.duplex.session import DuplexSession

REMEMBERED = 512
"""Pieces of text that a client may still revise."""
PENDING_CHARS = 8000
"""Characters that may wait for a slice."""


@dataclass
class Timing:
    """How the loop keeps up, in milliseconds."""

    period: int
    slices: int = 0
    late: int = 0
    """Slices that began after their time."""
    worst: int = 0


@dataclass
class Live:
    """A session, its client's words that no slice has taken yet, and what it says.

    The model works in `executor`, never in the event loop.
    """

    id: str
    session: DuplexSession
    executor: Executor
    period_ms: int
    interrupt: str = "immediate"
    journal: Journal | None = None
    now: Callable[[], float] = time.monotonic
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    out: Outbox = field(default_factory=Outbox)
    closed: str | None = None
    """Why it has ended."""
    attached: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether a client is there: without one, time stands still."""
    left: float = 0.0
    """When the last client went."""

    def __post_init__(self) -> None:
        """Begin with nothing said."""
        self.timing = Timing(self.period_ms)
        self.started = self.last_word = self.now()
        self.words: list[Words] = []
        self.keys: dict[int, int] = {}  # what the client calls a piece of text: what we call it
        self.next_key = 0
        self.client_time = 0
        self.answer: Answer | None = None
        self.playback = Playback()
        self.hurry = asyncio.Event()
        self.busy = False
        self.over: str | None = None  # how the present answer ends
        self.cut_off = False  # whether its last slice was stopped in the middle
        self.ended = asyncio.Event()
        """Whether the loop has stopped, and the place is free."""
        self.stops = False  # a word to stop that has come before its slice was begun

    def resumed(self) -> None:
        """Go on from what was kept, in mid-answer; new words get names that no old ones have."""
        keys = [words.key for unit in self.session.units for words in unit.parts]
        self.next_key = 1 + max(keys, default=-1)
        if self.session.answers:
            last = Answer(self.session.answers, self.session.spoken)
            self.playback.begin(last)  # its client may play it still
            self.answer = last if self.session.mid_answer else None

    # What is said to the client.

    def say(self, kind: str, /, **values: Any) -> None:
        """Tell the client; each event has the epoch and the milliseconds of the session."""
        t_ms = int((self.now() - self.started) * 1000)
        self.out.say({"type": kind, "epoch": self.session.epoch, "t_ms": t_ms, **values})

    def close(self, reason: str) -> None:
        """End the session."""
        if self.closed is None:
            self.closed = reason
            self.say("session.closed", reason=reason)
            self.session.abort()
            self.hurry.set()
            self.attached.set()

    # What the client says.

    async def hear(self, event: protocol.Client) -> None:
        """Do what a client asks for. Raises protocol.Refused if it can't be done."""
        if isinstance(event, protocol.Append):
            await self._words(event)
        elif isinstance(event, protocol.Clear):
            self.words.clear()
        elif isinstance(event, protocol.Cancel):
            await self._cancel()
        elif isinstance(event, protocol.Truncate | protocol.Ack):
            await self._heard(event)
        elif isinstance(event, protocol.Update):
            await self._update(event.session)
        elif isinstance(event, protocol.Close):
            self.close("client")
        elif isinstance(event, protocol.Resume):
            raise protocol.Refused("invalid_event", "session.resume is the first thing to say")

    async def _words(self, event: protocol.Append) -> None:
        if event.t is not None:
            if event.rev == 0 and event.t < self.client_time:
                raise protocol.Refused(
                    "clock", f"`t` is {event.t}, before {self.client_time}: it never goes back"
                )
            self.client_time = max(self.client_time, event.t)
        self.last_word = self.now()
        if event.rev and event.t is not None and event.t in self.keys:
            await self._revise(self.keys[event.t], event.text)
            return
        if not event.text.strip():
            return
        if sum(len(w.text) for w in self.words) + len(event.text) > PENDING_CHARS:
            raise protocol.Refused("too_much_text", "too many words wait for a slice already")
        key = self.next_key
        self.next_key += 1
        if event.t is not None:
            self.keys[event.t] = key
            if len(self.keys) > REMEMBERED:
                del self.keys[next(iter(self.keys))]
        self.words.append(Words(key, event.text.strip()))
        if self.interrupt == "immediate" and self.speaking:
            self.session.abort()
            self.hurry.set()

    async def _revise(self, key: int, text: str) -> None:
        for place, words in enumerate(self.words):
            if words.key == key:
                self.words[place] = Words(key, text.strip())
                return
        done = await self._work(lambda: self.session.revise(key, text))
        self.say("input_text.revised", accepted=done)

    @property
    def speaking(self) -> bool:
        """Tell whether the agent is in the middle of an answer."""
        return self.answer is not None

    async def _cancel(self) -> None:
        if self.answer is None:
            raise protocol.Refused("nothing_to_cancel", "nothing is being said")
        self.over = "cancelled"
        self.stops = not self.session.abort()  # its slice may wait behind another session's
        await self._work(self.session.hush)
        self.hurry.set()

    async def _heard(self, event: protocol.Truncate | protocol.Ack) -> None:
        number = _number(event.response_id)
        if number is None or number > self.session.answers:
            raise protocol.Refused("unknown_response", f"`{event.response_id}` is no answer")
        if isinstance(event, protocol.Ack):
            self.playback.hear(number, event.chars)
            return
        await self._truncate(number, event.chars)

    async def _truncate(self, number: int, chars: int) -> None:
        gone = await self._work(lambda: self.session.truncate(number, chars))
        if gone:
            self.playback.forget(number)
        self.say("conversation.item.truncated", response_id=Answer(number).id, tokens=gone)

    async def _update(self, options: protocol.Options) -> None:
        if options.interrupt is not None:
            self.interrupt = options.interrupt
        if options.threshold is not None:
            threshold = options.threshold
            await self._work(lambda: self.session.decide_by(threshold))
        self.say("session.updated", interrupt=self.interrupt, threshold=options.threshold)

    async def _work(self, task: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.executor, task)

    # Slices.

    async def run(self) -> None:
        """Make a slice at each tick until the session is closed.

        A slice that takes longer than its time delays the next one, which gets all words that have
        come meanwhile: slices are never queued.
        """
        due = self.now() + self.period_ms / 1000
        while self.closed is None:
            if not self.attached.is_set():
                await self.attached.wait()
                due = self.now() + self.period_ms / 1000
            early = await self._until(due)
            if self.closed is not None:
                return
            late = 0 if early else max(int((self.now() - due) * 1000), 0)
            due = (self.now() if early or late > self.period_ms else due) + self.period_ms / 1000
            await self._slice(late)

    async def _until(self, due: float) -> bool:
        """Wait for a time; tell whether it was cut short."""
        left = due - self.now()
        if left > 0:
            try:
                async with asyncio.timeout(left):
                    await self.hurry.wait()
            except TimeoutError:
                self.hurry.clear()
                return False
        early = self.hurry.is_set() and left > 0
        self.hurry.clear()
        return early

    async def _slice(self, late_ms: int) -> None:
        parts, self.words = tuple(self.words), []
        before = self.answer
        for cut in self.playback.cut() if parts else ():
            await self._truncate(cut.number, cut.heard)
        loop = asyncio.get_running_loop()

        def write(text: str) -> None:
            loop.call_soon_threadsafe(self._delta, self.session.answers, text)

        start = self.now()
        agent: AgentSlice = await self._work(lambda: self._step(parts, write))
        self._told(agent, parts, before)
        ms = int((self.now() - start) * 1000)
        self.timing.slices += 1
        self.timing.late += late_ms > self.period_ms // 2
        self.timing.worst = max(self.timing.worst, ms)
        self.say(
            "slice.stats",
            slice=agent.slice,
            slice_ms=ms,
            late_by_ms=late_ms,
            kv=agent.kv_length,
            forwards=agent.forwards,
            p_idle=round(agent.p_idle, 4),
            **({"cut": agent.cut} if agent.cut else {}),
        )

    def _step(self, parts: tuple[Words, ...], write: Callable[[str], None]) -> AgentSlice:
        if self.stops:
            self.session.hush()
        self.stops = False
        found = self.session.step(parts=parts, write=write)
        if self.journal is not None:
            self.journal.note(found)
        return found

    def _delta(self, number: int, text: str) -> None:
        if self.answer is None or self.answer.number != number:
            if self.answer is not None:
                self._done("interrupted")
            self.answer = Answer(number)
            self.playback.begin(self.answer)
            self.say("response.speak", response_id=self.answer.id)
        self.answer.chars += len(text)
        self.say(
            "response.output_text.delta",
            response_id=self.answer.id,
            delta=text,
            offset=self.answer.chars - len(text),
        )

    def _done(self, status: str) -> None:
        if self.answer is not None:
            self.say(
                "response.done",
                response_id=self.answer.id,
                status=status,
                chars=self.answer.chars,
            )
        self.answer = self.over = None

    def _told(self, agent: AgentSlice, parts: tuple[Words, ...], before: Answer | None) -> None:
        """Say what was decided."""
        decided = {
            "slice": agent.slice,
            "p_idle": round(agent.p_idle, 4),
            "reason": agent.reason,
            "kv": agent.kv_length,
        }
        if agent.evicted:
            self.say("session.evicted", tokens=agent.evicted)
        if parts and before is not None:
            same = agent.decision == "speak" and agent.answer == before.number
            kind = "continue" if same else "answer" if agent.decision == "speak" else "stop"
            self.say("overlap.decision", kind=kind, heard=joined(parts), **decided)
        if agent.decision == "speak":
            self.cut_off = agent.interrupted
            self.last_word = self.now()
        if agent.decision == "speak" and not agent.interrupted:
            self.say("response.decided", decision="speak", rewound=agent.rewound, **decided)
        if agent.decision == "listen":
            if self.answer is not None:
                cut = bool(parts) or agent.interrupted or self.cut_off
                self._done(self.over or ("interrupted" if cut else "completed"))
            self.over, self.cut_off = None, False
            self.say("response.listen", **decided)


def _number(response_id: str) -> int | None:
    """Return which answer a name is of; None if it is none."""
    digits = response_id.removeprefix("resp_")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def alone(model: Any, interrupt: str) -> Live:
    """Return a session of an opened model that nobody else talks to."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="model")
    return Live(secrets.token_hex(8), model.session(), executor, model.period_ms, interrupt)
