"""Slices as tokens, and back: which marks stand where. No torch, no tokenizer.

Beyond the Turn-Based Game: Enabling Real-Time Conversations with Duplex Models, arXiv 2406.15718.
A pair of slices is `user… agent… end`; a silent side holds the one token `idle`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from bmkit.data.slices.dialogue import Tag

SPEAKS = ("answer", "continue")
"""The states in which the agent speaks."""
STATES = ("listen", "think", "quiet", "yield", *SPEAKS)
"""What the agent says of the user's side first, with `state`: the user talks, pauses in mid-query,
has nothing more to say, interrupts; the agent answers, goes on."""
STATE_OF: dict[Tag, str] = {
    "mid": "listen",
    "noise": "listen",
    "pause": "think",
    "quiet": "quiet",
    "stop": "yield",
    "barge": "yield",
    "end": "answer",
    "side": "answer",
    "late": "answer",
    "cont": "continue",
    "backchannel": "continue",
}


@dataclass(frozen=True)
class Layout:
    """The token ids of a scheme's marks."""

    user: tuple[int, ...]
    agent: tuple[int, ...]
    idle: int
    end: int
    states: tuple[tuple[str, int], ...] = ()
    """With the scheme `state`: the token of each, in front of what the agent says."""
    opening: tuple[int, ...] = ()
    """What a session begins with."""

    @property
    def silent(self) -> tuple[int, ...]:
        """Return the tokens at an agent's first place that mean silence."""
        if not self.states:
            return (self.idle,)
        return tuple(token for name, token in self.states if name not in SPEAKS)

    @property
    def control(self) -> frozenset[int]:
        """Return the tokens that no text may hold."""
        states = (token for _, token in self.states)
        single = (m[0] for m in (self.user, self.agent) if len(m) == 1)
        return frozenset((self.idle, self.end, *states, *single))

    def user_side(self, ids: Sequence[int] | None) -> list[int]:
        """Return a user's side with the agent's mark behind it: what is read before a decision."""
        return [*self.user, *(ids if ids is not None else (self.idle,)), *self.agent]

    def agent_side(self, ids: Sequence[int] | None, tag: Tag | None = None) -> list[int]:
        """Return an agent's side with its end. With `state`, `tag` says which."""
        said = [self.idle] if ids is None else list(ids)
        if self.states:
            state = STATE_OF.get(tag) if tag is not None else None
            if state is None or (state in SPEAKS) != (ids is not None):
                state = "quiet" if ids is None else "answer"  # an end that was missed, as one
            said = [dict(self.states)[state], *(ids or ())]
        return [*said, self.end]


@dataclass(frozen=True)
class Pair:
    """The tokens of one slice; None is silence."""

    user: tuple[int, ...] | None
    agent: tuple[int, ...] | None
    tag: Tag | None = None
    weight: float = 1.0

    @property
    def silent(self) -> bool:
        """Tell whether nobody says anything."""
        return self.user is None and self.agent is None


@dataclass(frozen=True)
class Decision:
    """Where the agent decides: the token at `position` is its first one."""

    position: int
    speaks: bool
    tag: Tag | None


@dataclass
class Rendered:
    """A session's tokens. `learned` is 0 where the user speaks, else the weight of the loss."""

    ids: list[int] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Where each pair begins."""


class Spoken(Protocol):
    """One slice of both sides, in tokens."""

    @property
    def user(self) -> tuple[int, ...] | None:
        """Return what the user says; None is silence."""

    @property
    def silent(self) -> bool:
        """Tell whether nobody says anything."""


S = TypeVar("S", bound=Spoken)


def collapsed(pairs: Sequence[S]) -> Iterator[S]:
    """Yield the pairs that are left when silence takes one pair, however long it is.

    A silent pair goes once the user is silent in the next one as well.
    """
    for number, pair in enumerate(pairs):
        goes = pair.silent and number + 1 < len(pairs) and pairs[number + 1].user is None
        if not goes:
            yield pair


def refilled(pairs: Sequence[Pair], agent_tokens: int) -> list[Pair]:
    """Return pairs in which the agent says `agent_tokens` tokens a slice, as it does when it runs.

    What it says in one go is divided anew. If it doesn't fit, pairs in which the user is silent
    are put behind; where the user has interrupted, it is cut. Pairs that are left over with a
    silent user go; others stay, with a silent agent and no weight.
    """
    found: list[Pair] = []
    place = 0
    while place < len(pairs):
        run = [p for p in _run(pairs, place)]
        if not run:
            found.append(pairs[place])
            place += 1
            continue
        place += len(run)
        said = [token for pair in run for token in pair.agent or ()]
        parts = [tuple(said[i : i + agent_tokens]) for i in range(0, len(said), agent_tokens)]
        interrupted = place < len(pairs) and pairs[place].user is not None
        for number, pair in enumerate(run):
            if number < len(parts):
                found.append(Pair(pair.user, parts[number], pair.tag, pair.weight))
            elif pair.user is not None:
                found.append(Pair(pair.user, None, pair.tag, 0.0))
        if not interrupted:
            rest = parts[len(run) :]
            found += [Pair(None, part, "cont", run[-1].weight) for part in rest]
    return found


def _run(pairs: Sequence[Pair], place: int) -> Iterator[Pair]:
    """Yield the pairs from `place` on in which the agent says one thing: until it starts anew."""
    starts = ("end", "side", "late")
    for number, pair in enumerate(pairs[place:]):
        if pair.agent is None or (number and pair.tag in starts):
            return
        yield pair


def rendered(layout: Layout, pairs: Sequence[Pair], *, decision: float = 1.0) -> Rendered:
    """Return the tokens of a session; `decision` multiplies the weight of each first token."""
    found = Rendered(list(layout.opening), [0.0] * len(layout.opening))
    for pair in pairs:
        found.starts.append(len(found.ids))
        user, agent = layout.user_side(pair.user), layout.agent_side(pair.agent, pair.tag)
        found.decisions.append(
            Decision(len(found.ids) + len(user), pair.agent is not None, pair.tag)
        )
        found.ids += user + agent
        found.learned += [0.0] * len(user)
        found.learned += [pair.weight * decision] + [pair.weight] * (len(agent) - 1)
    return found


def parsed(layout: Layout, ids: Sequence[int]) -> list[Pair]:
    """Return the pairs of a session's tokens. Raises ValueError at what is no pair."""
    at = len(layout.opening)
    if tuple(ids[:at]) != layout.opening:
        raise ValueError("it doesn't begin as a session does")
    pairs: list[Pair] = []
    states = {token: name for name, token in layout.states}
    while at < len(ids):
        if tuple(ids[at : at + len(layout.user)]) != layout.user:
            raise ValueError(f"token {at} is not where a slice begins")
        at += len(layout.user)
        middle = _find(ids, layout.agent, at)
        end = next((i for i in range(middle, len(ids)) if ids[i] == layout.end), None)
        if end is None:
            raise ValueError(f"the slice before token {len(ids)} has no end")
        user = tuple(ids[at:middle])
        agent = tuple(ids[middle + len(layout.agent) : end])
        said: tuple[int, ...] | None = agent
        if states:
            said = agent[1:] if states.get(next(iter(agent), -1)) in SPEAKS else None
        elif agent == (layout.idle,):
            said = None
        pairs.append(Pair(None if user == (layout.idle,) else user, said))
        at = end + 1
    return pairs


def _find(ids: Sequence[int], mark: tuple[int, ...], start: int) -> int:
    for at in range(start, len(ids) - len(mark) + 1):
        if tuple(ids[at : at + len(mark)]) == mark:
            return at
    raise ValueError(f"the slice at token {start} has no agent's side")
