"""The names of what `bmkit duplex eval` measures, as `gates` and manifests have them. No torch."""

from __future__ import annotations

CONDITIONS = ("punctuated", "unpunctuated")
"""What the user says as it is written, and as a recogniser of speech writes it."""
DECISION = (
    *("idle_precision", "idle_recall", "idle_f1", "idle_f1_macro", "accuracy"),
    *("false_takeover_rate", "backchannel_resume", "lead"),
)
"""Of the suite `decision`. `lead`: by how much `idle_f1` is above the best rule's."""
CONVERSATION = (
    *("false_takeover_rate", "noise_takeover_rate", "takeover_rate", "unanswered_rate"),
    *("response_latency_p50", "response_latency_p95"),
    *("response_latency_ms_p50", "response_latency_ms_p95"),
    *("stop_latency_p50", "stop_latency_p95", "stop_latency_max", "stopped_rate"),
    *("interrupt_success", "backchannel_resume", "resume_coherence"),
    *("overlap_ratio", "talk_share", "non_idle_rate"),
)
"""Of the suites `replay` and `simulate`."""
RETAIN = tuple(
    f"retain_{what}_{when}"
    for what in ("loss", "accuracy")
    for when in ("before", "after", "change")
)
"""Of the suite `retain`; `change` is relative for the loss, and in shares for the accuracy."""


def name(suite: str, condition: str, figure: str) -> str:
    """Return what a figure is called: `decision_unpunctuated_idle_f1`."""
    return f"{suite}_{condition}_{figure}"


def measured(suite: str) -> tuple[str, ...]:
    """Return the figures of a suite that a manifest has, by condition."""
    return DECISION if suite == "decision" else CONVERSATION


METRICS = (
    *(
        name(suite, condition, figure)
        for suite in ("decision", "replay", "simulate")
        for condition in CONDITIONS
        for figure in measured(suite)
    ),
    *RETAIN,
)
