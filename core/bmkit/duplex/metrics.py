"""How well turns are taken: figures of decisions, and of conversations that ran by themselves.

The names follow Full-Duplex-Bench, arXiv 2503.04721, on text instead of sound. A share without
anything to be a share of is left out. Slices count from 0: an answer in the very slice that ends
a query has the latency 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bmkit.data.slices.dialogue import UNFINISHED, Tag
from bmkit.duplex.agents import Decided
from bmkit.duplex.wording import longest_common, shares_words

Metrics = dict[str, float | int]


def decision_metrics(found: Sequence[Decided]) -> Metrics:
    """Return figures of decisions, each made where a dialogue has gone as it is written.

    `idle_precision`, `idle_recall`, `idle_f1`: of silence. `idle_f1_macro`: the same where each
    tag has the same weight, however many slices it has. `accuracy`, `accuracy_TAG`: right ones, of
    `count_TAG`.
    `false_takeover_rate`: spoke while the user had not finished. `backchannel_resume`: went on
    while the user said no more than `I see`.
    """
    counts = Counter(one.tag for one in found)
    values: Metrics = {"decisions": len(found)}
    for suffix, weights in (
        ("", dict.fromkeys(counts, 1.0)),
        ("_macro", {tag: 1.0 / number for tag, number in counts.items()}),
    ):
        hits = sum(weights[d.tag] for d in found if not d.wanted and not d.speaks)
        said = sum(weights[d.tag] for d in found if not d.speaks)
        right = sum(weights[d.tag] for d in found if not d.wanted)
        precision, recall = _share(hits, said), _share(hits, right)
        values[f"idle_precision{suffix}"] = precision
        values[f"idle_recall{suffix}"] = recall
        both = precision + recall
        values[f"idle_f1{suffix}"] = 2 * precision * recall / both if both else 0.0
    values["accuracy"] = _share(sum(d.wanted == d.speaks for d in found), len(found))
    for tag in counts:
        own = [d for d in found if d.tag == tag]
        values[f"count_{tag}"] = len(own)
        values[f"accuracy_{tag}"] = sum(d.wanted == d.speaks for d in own) / len(own)
    if early := [d for d in found if d.tag in UNFINISHED]:
        values["false_takeover_rate"] = sum(d.speaks for d in early) / len(early)
    if heard := [d for d in found if d.tag == "backchannel" and d.wanted]:
        values["backchannel_resume"] = sum(d.speaks for d in heard) / len(heard)
    return values


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class Moment:
    """A slice of a conversation that ran by itself."""

    user: str | None
    agent: str | None
    tag: Tag | None
    """What the user does in it; None: nothing, and no answer is asked for."""
    p_idle: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Conversation:
    """What was said by both, and what was asked for."""

    id: str
    moments: tuple[Moment, ...]
    references: tuple[str, ...] = ()
    """What the agent was to say to each finished turn, in their order."""
    repeats: int = 0
    """How often the user has said a query again, as nobody answered."""


@dataclass(frozen=True)
class Turn:
    """A query of the user's: slices `start` to `end`, both in it."""

    start: int
    end: int
    interrupts: bool
    """Whether it began while the agent spoke."""
    tag: Tag


FINISHED: tuple[Tag, ...] = ("end", "side")
SPOKEN: tuple[Tag, ...] = ("mid", "barge", "stop", *FINISHED)
"""Tags of slices in which the user has the word."""


def turns(moments: Sequence[Moment]) -> Iterator[Turn]:
    """Yield the queries and the requests for silence in a conversation."""
    start: int | None = None
    for at, moment in enumerate(moments):
        if moment.tag not in (*SPOKEN, "pause"):
            continue
        start = at if start is None else start
        following = moments[at + 1].tag if at + 1 < len(moments) else None
        if moment.tag in FINISHED or (moment.tag == "stop" and following != "stop"):
            speaking = start > 0 and moments[start - 1].agent is not None
            yield Turn(start, at, speaking, moment.tag)
            start = None


def answered_at(moments: Sequence[Moment], turn: Turn, window: int) -> int | None:
    """Return how many slices behind a query's end it is answered, 0 for its very end.

    None if nothing is said within `window` slices, or before the user takes the word again.
    """
    for late in range(window + 1):
        at = turn.end + late
        if at >= len(moments) or (late and moments[at].tag in SPOKEN):
            return None
        if moments[at].agent is not None:
            return late
    return None


def answer(moments: Sequence[Moment], turn: Turn) -> str:
    """Return what the agent says between a query's end and the user's next words."""
    said = []
    for at in range(turn.end, len(moments)):
        if at > turn.end and moments[at].tag in SPOKEN:
            break
        said.append(moments[at].agent or "")
    return "".join(said)


def slices_until_silent(moments: Sequence[Moment], turn: Turn) -> int:
    """Return in how many slices the agent goes on, from the first of an interruption.

    A query may be answered in its last slice, which doesn't count; a request for silence is
    followed until the user takes the word.
    """
    end = turn.end
    if turn.tag == "stop":
        end += 1
        while end < len(moments) and moments[end].tag not in SPOKEN:
            end += 1
    count = 0
    while turn.start + count < end and moments[turn.start + count].agent is not None:
        count += 1
    return count


def conversation_metrics(found: Sequence[Conversation], *, window: int, slice_ms: int) -> Metrics:
    """Return figures of conversations that ran by themselves.

    `false_takeover_rate`: share of the slices in which the user has not finished that the agent
    spoke in, words to somebody else in between included. `takeover_rate`: share of finished turns
    behind which it said four words, or for a second, within `window` slices. `unanswered_rate`:
    share of them behind which it said nothing. `response_latency_…`: from the end of a turn to the
    first word, in slices, and in milliseconds of the virtual clock. `stop_latency_…`: slices in
    which it went on after an interruption. `interrupt_success`: share of interruptions that stopped
    it within a slice and, if it was a query, were answered with words of the new request or of the
    answer that was written for it; a request for silence has to be kept until the user's next
    words. `stopped_rate`: the same, whatever is answered. `noise_takeover_rate`: share of the times
    when words weren't meant for it that it spoke up, within `window` slices behind them.
    `backchannel_resume`: share of the `I see` in mid-sentence behind which it went on.
    `resume_coherence`: ROUGE-L (longest common subsequence, F1) of what it says to a question in
    between against what is written. `overlap_ratio`: share of the slices with a word of either in
    which both are heard. `talk_share`: of the slices with words, those of the agent.
    `non_idle_rate`: share of all slices it speaks in.
    """
    tally: dict[str, list[float]] = defaultdict(list)
    for one in found:
        _tally(one, window, slice_ms, tally)
    values: Metrics = {"conversations": len(found), "slices": len(tally["non_idle_rate"])}
    values["turns"] = len(tally["unanswered_rate"])
    values["interruptions"] = len(tally["interrupt_success"])
    values["repeats"] = sum(one.repeats for one in found)
    for name in _SHARES:
        if tally[name]:
            values[name] = sum(tally[name]) / len(tally[name])
    agent, user = sum(tally["non_idle_rate"]), sum(tally["user"])
    if agent + user:
        values["talk_share"] = agent / (agent + user)
    for name in ("response_latency", "stop_latency"):
        if slices := tally[name]:
            for share in (50, 95):
                late = percentile(slices, share)
                values[f"{name}_p{share}"] = late
                values[f"{name}_ms_p{share}"] = late * slice_ms
            values[f"{name}_max"] = max(slices)
    return values


WORDED = ("interrupt_success", "resume_coherence")
"""Figures that look at words: they say nothing of an agent whose words mean nothing."""
_SHARES = (
    "false_takeover_rate",
    "noise_takeover_rate",
    "takeover_rate",
    "unanswered_rate",
    "stopped_rate",
    "interrupt_success",
    "backchannel_resume",
    "resume_coherence",
    "overlap_ratio",
    "non_idle_rate",
)


def _tally(one: Conversation, window: int, slice_ms: int, tally: dict[str, list[float]]) -> None:
    """Add what a conversation says to each figure: a value for each thing that it is a share of."""
    moments = one.moments
    owned = _within_turns(moments)
    references = iter(one.references)
    for at, moment in enumerate(moments):
        spoke = moment.agent is not None
        tally["non_idle_rate"].append(spoke)
        tally["user"].append(moment.user is not None)
        if moment.tag in UNFINISHED or (moment.tag == "noise" and at in owned):
            tally["false_takeover_rate"].append(spoke)
        before = moments[at - 1].agent if at else None  # heard while this slice is spoken
        if before is not None or moment.user is not None:
            tally["overlap_ratio"].append(before is not None and moment.user is not None)
        said = before is not None and not before.rstrip().endswith((".", "?", "!"))
        if moment.tag == "backchannel" and said:
            went_on = any(m.agent is not None for m in moments[at : at + 2])
            tally["backchannel_resume"].append(went_on)
    tally["noise_takeover_rate"] += noise_answered(moments, window)
    for turn in turns(moments):
        reference = next(references, "") if turn.tag in FINISHED else ""
        if turn.tag in FINISHED:
            late = answered_at(moments, turn, window)
            tally["unanswered_rate"].append(late is None)
            tally["takeover_rate"].append(_takes_over(moments, turn, window, slice_ms))
            if late is not None:
                tally["response_latency"].append(late)
            if turn.tag == "side":
                coherence = longest_common(answer(moments, turn), reference)
                tally["resume_coherence"].append(coherence)
        if turn.interrupts:
            _tally_interruption(one, turn, reference, tally)


def _tally_interruption(
    one: Conversation, turn: Turn, reference: str, tally: dict[str, list[float]]
) -> None:
    moments = one.moments
    late = slices_until_silent(moments, turn)
    if turn.start < turn.end or turn.tag == "stop":  # else there is no slice to be silent in
        tally["stop_latency"].append(late)
    right = late <= 1
    if turn.tag == "stop":
        right = right and not _speaks_again(moments, turn.start + late)
    tally["stopped_rate"].append(right)
    if turn.tag != "stop":
        said = " ".join(m.user or "" for m in moments[turn.start : turn.end + 1])
        right = right and shares_words(answer(moments, turn), f"{said} {reference}")
    tally["interrupt_success"].append(right)


def _within_turns(moments: Sequence[Moment]) -> set[int]:
    return {at for turn in turns(moments) for at in range(turn.start, turn.end + 1)}


def noise_answered(moments: Sequence[Moment], window: int) -> list[bool]:
    """Tell of each time when words aren't meant for the agent whether it speaks up.

    That is from their first slice to `window` slices behind them, or the user's next words. Times
    when it speaks already are left out, and those within a query.
    """
    found = []
    owned = _within_turns(moments)
    for at, moment in enumerate(moments):
        before = moments[at - 1] if at else None
        begins = moment.tag == "noise" and (before is None or before.tag != "noise")
        if not begins or at in owned or (before is not None and before.agent is not None):
            continue
        end = at
        while end < len(moments) and moments[end].tag == "noise":
            end += 1
        behind = moments[end : end + window]
        calm = next((i for i, m in enumerate(behind) if m.user is not None), len(behind))
        found.append(any(m.agent is not None for m in [*moments[at:end], *behind[:calm]]))
    return found


def _speaks_again(moments: Sequence[Moment], at: int) -> bool:
    """Tell whether anything is said from a slice on, before the user takes the word anew."""
    begun = moments[at].tag == "stop" if at < len(moments) else False
    for moment in moments[at:]:
        if moment.tag in SPOKEN and not (begun and moment.tag == "stop"):
            return False
        begun = moment.tag == "stop"
        if moment.agent is not None:
            return True
    return False


def _takes_over(moments: Sequence[Moment], turn: Turn, window: int, slice_ms: int) -> bool:
    spoken = []
    for at in range(turn.end, min(turn.end + window + 1, len(moments))):
        if at > turn.end and moments[at].tag in SPOKEN:
            break
        if (said := moments[at].agent) is not None:
            spoken.append(said)
    return len(" ".join(spoken).split()) >= 4 or len(spoken) * slice_ms >= 1000


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that `share` percent of all don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def speed(seconds: Sequence[float], slice_ms: int) -> Metrics:
    """Return how long slices took on this machine's clock, and how many took longer than one."""
    if not seconds:
        return {}
    ms = [1000 * one for one in seconds]
    return {
        "slice_ms_p50": round(percentile(ms, 50), 3),
        "slice_ms_p95": round(percentile(ms, 95), 3),
        "slice_ms_max": round(max(ms), 3),
        "deadline_miss_rate": sum(one > slice_ms for one in ms) / len(ms),
        "rtf_p95": round(percentile(ms, 95) / slice_ms, 6),
    }
