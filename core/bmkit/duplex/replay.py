"""A timed transcript through a session, on a clock that computing takes no time of."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bmkit.data.slices import transcript
from bmkit.data.slices.slicer import Heard, by_time
from bmkit.data.slices.transcript import Transcript
from bmkit.duplex.agent import AgentSlice
from bmkit.duplex.clock import VirtualClock
from bmkit.duplex.opening import Opened
from bmkit.duplex.session import DuplexSession

MOST_TAIL = 64
"""Slices behind the last words of the user at the most."""


@dataclass(frozen=True)
class Replayed:
    """One slice: what was heard, and what the agent did at its end, `t` milliseconds."""

    t: int
    period_ms: int
    heard: Heard
    agent: AgentSlice
    ignored: int = 0
    """Revisions that came too late."""

    def rows(self) -> list[dict[str, Any]]:
        """Return it as lines of a transcript. Nothing in them depends on the machine's clock."""
        found: list[dict[str, Any]] = []
        start = self.t - self.period_ms
        if (text := self.heard.text) is not None:
            found.append({"type": "user", "t": start, "t_end": self.t, "text": text})
        agent = {"type": "agent", "t": self.t, **self.agent.values()}
        if self.heard.revisions:
            agent["revised"] = len(self.heard.revisions) - self.ignored
        if self.ignored:
            agent["ignored"] = self.ignored
        return [*found, agent]


def replay(
    session: DuplexSession, given: Transcript, period_ms: int, *, tail: int = MOST_TAIL
) -> Iterator[Replayed]:
    """Run a session on what a transcript's user said; what its agent said isn't looked at.

    It goes on behind the last words until nothing more can come: the agent is silent, as it was
    in the slice before, and nobody waits; for `tail` slices at the most.
    """
    clock = VirtualClock()
    heard = by_time(given.said, period_ms)
    last = max((label.t for label in given.labels), default=0)
    least = max(len(heard), -(-last // period_ms))
    silent = 0
    number = 0
    while number < least or (silent < 2 + _patience(session) and number < least + tail):
        now = heard[number] if number < len(heard) else Heard(number)
        clock.wait_until((number + 1) * period_ms)
        ignored = sum(not session.revise(r.key, r.text) for r in now.revisions)
        agent = session.step(parts=now.parts)
        silent = 0 if agent.decision == "speak" or now.parts else silent + 1
        yield Replayed(clock.now(), period_ms, now, agent, ignored)
        number += 1


def _patience(session: DuplexSession) -> int:
    return session.settings.policy.max_wait or 0


def head(opened: Opened, given: Transcript) -> dict[str, Any]:
    """Return the first line of what a replay writes: it is a transcript itself."""
    policy, how = opened.settings.policy, opened.settings.sampling
    settings = {
        "threshold": policy.threshold,
        "max_wait_slices": policy.max_wait,
        "agent_tokens": opened.settings.agent_tokens,
        "temperature": how.temperature,
        "seed": how.seed,
    }
    return {
        "v": transcript.VERSION,
        "type": "session",
        "id": given.id,
        "scheme": opened.known.scheme,
        "slice_ms": opened.period_ms,
        "lang": given.lang,
        "meta": {**given.meta, "model": opened.model, **settings},
    }


WIDTH = 36
"""Columns of the user's side."""
SILENCE = "·"


def lines(found: Replayed) -> Iterator[str]:
    """Yield a slice for people: its end in seconds, the user, the agent; `·` is silence."""
    user = _wrapped(_plain(found.heard.text), WIDTH)
    agent = found.agent
    said = _plain(agent.text)
    if said == SILENCE and agent.decision == "speak":
        said = "…"  # nothing that can be seen
    if agent.rewound:
        said = f"↶ {said}"
    if agent.interrupted:
        said += " —"
    yield f"{found.t / 1000:7.1f}  {user[0]:{WIDTH}}  {said}"
    for part in user[1:]:
        yield f"{'':7}  {part}"


def _plain(text: str | None) -> str:
    """Return text on one line, without what would move a terminal's cursor."""
    whole = "".join(c if c.isprintable() else " " for c in text or "")
    return " ".join(whole.split()) or SILENCE


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=True) or [""]
