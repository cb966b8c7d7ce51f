"""What was found, as Markdown: the model beside the rules, a table for each suite and condition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bmkit.data.slices.dialogue import TAGS

Figures = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | int]]]]
"""By suite, condition and agent: figures by name."""

TITLES = {
    "decision": "Decisions, each where the dialogue has gone as it is written",
    "replay": "Conversations with a user who speaks at fixed times",
    "simulate": "Conversations with a user who reacts",
}
BETTER = {
    **dict.fromkeys(("idle_precision", "idle_recall", "idle_f1", "idle_f1_macro"), "↑"),
    **dict.fromkeys(("accuracy", "takeover_rate", "interrupt_success", "stopped_rate"), "↑"),
    **dict.fromkeys(("backchannel_resume", "resume_coherence"), "↑"),
    **dict.fromkeys(("false_takeover_rate", "unanswered_rate", "noise_takeover_rate"), "↓"),
    **dict.fromkeys(("response_latency_p50", "response_latency_p95"), "↓"),
    **dict.fromkeys(("stop_latency_p50", "stop_latency_p95", "stop_latency_max"), "↓"),
}
"""Which way a figure is better, if either."""


def markdown(
    title: str,
    figures: Figures,
    *,
    sweeps: Mapping[str, Sequence[Mapping[str, float]]],
    kept: Mapping[str, float],
) -> str:
    """Return all that was found as Markdown."""
    parts = [f"# {title}", ""]
    for suite, conditions in figures.items():
        parts += [f"## {TITLES[suite]}", ""]
        for condition, agents in conditions.items():
            parts += [f"### {suite}, {condition}", "", *_figures(agents), ""]
            if suite == "decision":
                parts += [*_tags(agents), ""]
    for condition, table in sweeps.items():
        if table:
            parts += [f"### thresholds, {condition}", "", *_rows(table), ""]
    if kept:
        lines = [{"figure": name, "value": value} for name, value in kept.items()]
        parts += ["## Ordinary tasks, before and after", "", *_rows(lines), ""]
    return "\n".join(parts)


def _figures(agents: Mapping[str, Mapping[str, float | int]]) -> Iterator[str]:
    """Yield a table with a row a figure and a column an agent."""
    names = list(dict.fromkeys(name for found in agents.values() for name in found))
    shown = [n for n in names if not n.startswith(("accuracy_", "count_")) and "_ms_" not in n]
    yield from _table(
        ("", "better", *agents),
        [
            (name, BETTER.get(name, ""), *(_cell(found.get(name)) for found in agents.values()))
            for name in shown
        ],
    )


def _tags(agents: Mapping[str, Mapping[str, float | int]]) -> Iterator[str]:
    """Yield a table of how often decisions are right, by what the user does."""
    names = [tag for tag in TAGS if any(f"accuracy_{tag}" in found for found in agents.values())]
    first = next(iter(agents.values()))
    yield from _table(
        ("right at", "slices", *agents),
        [
            (
                f"`{tag}`",
                _cell(first.get(f"count_{tag}")),
                *(_cell(found.get(f"accuracy_{tag}")) for found in agents.values()),
            )
            for tag in names
        ],
    )


def _rows(table: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    heads = list(table[0])
    yield from _table(heads, [[_cell(row[head]) for head in heads] for row in table])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _cell(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
