"""What is measured of an agent on dialogues: its decisions, and conversations with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bmkit.data.slices.dialogue import Dialogue
from bmkit.duplex.agents import Agent, Decided
from bmkit.duplex.figures import CONDITIONS
from bmkit.duplex.metrics import (
    WORDED,
    Conversation,
    Metrics,
    conversation_metrics,
    decision_metrics,
)
from bmkit.duplex.speech import unpunctuated
from bmkit.duplex.user import replayed, simulated

TAUS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)


@dataclass
class Found:
    """What a suite has found of an agent under one condition."""

    metrics: Metrics
    conversations: list[Conversation] = field(default_factory=list)
    decided: list[Decided] = field(default_factory=list)


def without_punctuation(dialogue: Dialogue) -> Dialogue:
    """Return a dialogue whose user speaks as a recogniser writes; what the agent says stays."""
    slices = tuple(
        one if one.user is None else replace(one, user=unpunctuated(one.user))
        for one in dialogue.slices
    )
    return replace(dialogue, slices=slices)


def of_condition(dialogues: Sequence[Dialogue], condition: str) -> list[Dialogue]:
    """Return the dialogues with what the user says as one of CONDITIONS has it."""
    if condition == CONDITIONS[0]:
        return list(dialogues)
    return [without_punctuation(one) for one in dialogues]


def measure(
    suite: str,
    agent: Agent,
    dialogues: Sequence[Dialogue],
    *,
    window: int,
    slice_ms: int,
    advance: Callable[[float], None] = lambda _: None,
) -> Found:
    """Run one of the suites `decision`, `replay` and `simulate`.

    `advance` is told of each dialogue. Every conversation begins anew.
    """
    decided: list[Decided] = []
    conversations = []
    for dialogue in dialogues:
        if suite == "decision":
            decided += agent.judge(dialogue)
        elif suite == "replay":
            conversations.append(replayed(agent.open(), dialogue, window))
        else:
            conversations.append(simulated(agent.open(), dialogue, window))
        advance(1)
    if suite == "decision":
        return Found(decision_metrics(decided), decided=decided)
    metrics = conversation_metrics(conversations, window=window, slice_ms=slice_ms)
    if agent.wordless:
        metrics = {name: value for name, value in metrics.items() if name not in WORDED}
    return Found(metrics, conversations)


def answer_length(dialogues: Sequence[Dialogue]) -> int:
    """Return in how many slices the agent speaks from when it begins: the mean, rounded up."""
    runs = slices = 0
    for dialogue in dialogues:
        spoke = False
        for one in dialogue.slices:
            speaks = one.agent is not None
            runs += speaks and (not spoke or one.tag in ("end", "side", "late"))
            slices += speaks
            spoke = speaks
    return math.ceil(slices / runs) if runs else 1


def sweep(decided: Sequence[Decided], taus: Sequence[float] = TAUS) -> list[dict[str, Any]]:
    """Return what decisions would be worth if silence had to be as likely as each threshold.

    Nothing if some decision has no probability.
    """
    if not decided or any(one.p_idle is None for one in decided):
        return []
    table = []
    for tau in taus:
        moved = [Decided(d.tag, d.wanted, (d.p_idle or 0.0) < tau, d.p_idle) for d in decided]
        found = decision_metrics(moved)
        asked = [d.speaks for d in moved if d.tag in ("end", "side")]
        done = [d.speaks for d in moved if d.tag in ("quiet", "stop")]
        table.append(
            {
                "tau": tau,
                "idle_f1": found["idle_f1"],
                "false_takeover_rate": found.get("false_takeover_rate", 0.0),
                "answered_at_once": sum(asked) / len(asked) if asked else 0.0,
                "spoke_when_done": sum(done) / len(done) if done else 0.0,
            }
        )
    return table
