"""`bmkit duplex eval`: a model on dialogues it hasn't seen, beside rules that take turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bmkit import hashes, report
from bmkit.data.slices.dialogue import Dialogue
from bmkit.duplex import account, figures, held_out, opening, retain, timeline
from bmkit.duplex.agents import Agent
from bmkit.duplex.baselines import baselines
from bmkit.duplex.figures import CONDITIONS
from bmkit.duplex.metrics import Conversation, Metrics, speed
from bmkit.duplex.recipe import DuplexRecipe
from bmkit.duplex.subject import Subject
from bmkit.duplex.suites import Found, answer_length, measure, of_condition, sweep
from bmkit.duplex.trained import known_of
from bmkit.plan import Job, Outcome

JSON, MARKDOWN, PICTURE = "report.json", "report.md", "timeline.svg"
TALKS, DECISIONS = "conversations.jsonl", "decisions.jsonl"
VERSION = 1


def run(job: Job) -> Outcome:
    """Measure the job's model, and write what was found into `job.out`.

    Nothing in it depends on the clock: how long slices took is in the outcome's report alone.
    Peak memory: the model, and one session's cache.
    """
    recipe = job.recipe
    assert isinstance(recipe, DuplexRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    file = held_out.file_of(job.files)
    dialogues = held_out.read(file, recipe.eval.limit)
    known, _ = known_of(job)
    slice_ms = opening.period_of(recipe, known)
    suites = [suite for suite in dict.fromkeys(recipe.eval.suites) if suite != "retain"]
    found: dict[str, dict[str, dict[str, Found]]] = {}
    if suites:
        opened = opening.run(job)
        found = measured(
            Subject(opened.session()),
            dialogues,
            suites,
            window=recipe.eval.window_slices,
            slice_ms=slice_ms,
            reporter=job.reporter,
        )
        opened.close()
    kept: dict[str, float] = {}
    if "retain" in recipe.eval.suites:
        kept = retain.measure(job)
    tables = {
        suite: {
            condition: {name: _rounded(one.metrics) for name, one in agents.items()}
            for condition, agents in conditions.items()
        }
        for suite, conditions in found.items()
    }
    sweeps = {
        condition: sweep(agents[Subject.name].decided)
        for condition, agents in found.get("decision", {}).items()
    }
    values = {
        "version": VERSION,
        "model": job.model.digest,
        "dialogues": {"sha256": hashes.hash_file(file), **_counts(dialogues)},
        "slice_ms": slice_ms,
        "window_slices": recipe.eval.window_slices,
        "policy": recipe.policy.model_dump(mode="json") | {"calibrated": known.threshold},
        "suites": tables,
        "thresholds": sweeps,
        "retain": _rounded(kept),
    }
    _write(job.out / JSON, json.dumps(values, indent=1) + "\n")
    title = f"{len(dialogues)} dialogues, slices of {slice_ms} ms"
    text = account.markdown(title, tables, sweeps=sweeps, kept=_rounded(kept))
    _write(job.out / MARKDOWN, text)
    _decisions(job.out, found)
    _conversations(job.out, found, dialogues, slice_ms)
    return Outcome("report", chosen(tables) | _rounded(kept), report=_report(found, slice_ms))


def measured(
    subject: Agent,
    dialogues: Sequence[Dialogue],
    suites: Sequence[str],
    *,
    window: int,
    slice_ms: int,
    reporter: report.Reporter,
) -> dict[str, dict[str, dict[str, Found]]]:
    """Return what each suite finds, by condition, of the subject and of the rules beside it."""
    found: dict[str, dict[str, dict[str, Found]]] = {}
    agents = [subject, *baselines(answer_length(dialogues))]
    total = len(suites) * len(CONDITIONS) * len(dialogues)
    with report.task(reporter, "measuring", total, "dialogues") as bar:
        for suite in suites:
            for condition in CONDITIONS:
                rows = of_condition(dialogues, condition)
                own = found.setdefault(suite, {}).setdefault(condition, {})
                for agent in agents:
                    own[agent.name] = measure(
                        suite,
                        agent,
                        rows,
                        window=window,
                        slice_ms=slice_ms,
                        advance=bar.advance if agent is subject else lambda _: None,
                    )
    for conditions in found.get("decision", {}).values():
        own_f1 = float(conditions[subject.name].metrics["idle_f1"])
        best = max(float(conditions[rule.name].metrics["idle_f1"]) for rule in agents[1:])
        conditions[subject.name].metrics["lead"] = own_f1 - best
    return found


def chosen(tables: account.Figures) -> dict[str, float | int | str]:
    """Return the figures of the model that a manifest has, by the names that gates use."""
    return {
        figures.name(suite, condition, figure): agents[Subject.name][figure]
        for suite, conditions in tables.items()
        for condition, agents in conditions.items()
        for figure in figures.measured(suite)
        if figure in agents[Subject.name]
    }


def _counts(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    tags: dict[str, int] = {}
    for dialogue in dialogues:
        for one in dialogue.slices:
            tags[one.tag] = tags.get(one.tag, 0) + 1
    return {
        "count": len(dialogues),
        "slices": sum(tags.values()),
        "tags": dict(sorted(tags.items())),
    }


def _rounded(found: Metrics) -> Metrics:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()}


def _report(found: dict[str, dict[str, dict[str, Found]]], slice_ms: int) -> dict[str, Any]:
    """Return how long the model's slices took, on this machine, this time."""
    seconds = [
        moment.seconds
        for conditions in found.values()
        for agents in conditions.values()
        for conversation in agents[Subject.name].conversations
        for moment in conversation.moments
        if moment.seconds is not None
    ]
    return {"slices": len(seconds), **speed(seconds, slice_ms)}


def _decisions(out: Path, found: dict[str, dict[str, dict[str, Found]]]) -> None:
    """Write each decision of the model, beside the right one."""
    lines = []
    for condition, agents in found.get("decision", {}).items():
        for one in agents[Subject.name].decided:
            values: dict[str, Any] = {
                "condition": condition,
                "id": one.dialogue,
                "tag": one.tag,
                "u": one.heard,
            }
            values |= {"wanted": one.wanted, "speaks": one.speaks}
            values["p_idle"] = None if one.p_idle is None else round(one.p_idle, 4)
            lines.append(json.dumps(values, ensure_ascii=False))
    if lines:
        _write(out / DECISIONS, "\n".join(lines) + "\n")


def _conversations(
    out: Path,
    found: dict[str, dict[str, dict[str, Found]]],
    dialogues: Sequence[Dialogue],
    slice_ms: int,
) -> None:
    """Write what was said in all conversations of the model, and a picture of a few."""
    lines = []
    shown: list[Conversation] = []
    for suite, conditions in found.items():
        for condition, agents in conditions.items():
            talks = agents[Subject.name].conversations
            lines += [
                json.dumps(_values(suite, condition, one), ensure_ascii=False) for one in talks
            ]
            if condition == CONDITIONS[-1]:  # the harder one; of the suites, the last
                places = timeline.chosen(talks, [d.kind for d in dialogues])
                shown = [talks[place] for place in places] or shown
    if lines:
        _write(out / TALKS, "\n".join(lines) + "\n")
        _write(out / PICTURE, timeline.picture(shown, slice_ms))


def _values(suite: str, condition: str, one: Conversation) -> dict[str, Any]:
    slices = [
        {
            "u": m.user,
            "a": m.agent,
            "tag": m.tag,
            "p_idle": None if m.p_idle is None else round(m.p_idle, 4),
        }
        for m in one.moments
    ]
    return {"suite": suite, "condition": condition, "id": one.id, "slices": slices}


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
