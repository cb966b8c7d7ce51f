"""Does a duplex model speak when it should? Decisions on given dialogues, and their figures.

Each slice is decided behind what was right before it (teacher-forced). Figures are those of
text-only full-duplex benchmarks: a takeover is an answer where the user has ended, a false one is
where the user has not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.data.chat import IGNORED
from bmkit.data.slices.dialogue import TAGS, UNFINISHED, Tag
from bmkit.data.slices.examples import decoded
from bmkit.train import head as heads

ENDED: tuple[Tag, ...] = ("end", "side")
"""The tags at which the agent is to answer at once."""
ROWS = 256
"""Logits of so many decisions are made at a time."""


@dataclass
class Decided:
    """What a model decides, a slice each."""

    loss: float = 0.0
    """Mean weighted cross-entropy of the agent's tokens."""
    silence: list[float] = field(default_factory=list)
    """How likely silence is."""
    silent: list[bool] = field(default_factory=list)
    """Whether its likeliest token is one of silence."""
    speaks: list[bool] = field(default_factory=list)
    """Whether it is right to speak."""
    tags: list[Tag] = field(default_factory=list)


@torch.no_grad()
def decide(
    model: Any, batches: Sequence[Mapping[str, Tensor]], silent: Sequence[int], device: torch.device
) -> Decided:
    """Return what `model` decides at `batch["decisions"]` [batch, time] of each batch.

    `silent` are the tokens of silence. Peak memory beside the model: one batch's hidden states, and
    the logits of 256 places.
    """
    found, head = Decided(), heads.find(model)
    total, count = 0.0, 0
    quiet = torch.tensor(silent, device=device)
    for given in batches:
        batch = {name: value.to(device) for name, value in given.items()}
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask")} | {"use_cache": False}
        whole = model(**inputs).logits if head is None else head.read(model, inputs)
        behind = whole[:, -batch["labels"].shape[1] :][:, :-1]  # virtual tokens are in front
        targets, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        there = targets != IGNORED
        if head is None:
            each = functional.cross_entropy(behind[there].float(), targets[there], reduction="none")
            total += float(each @ weights[there])
        else:
            total += float(head.cross_entropy(behind[there], targets[there], weights[there]))
        count += int(there.sum())
        numbers = batch["decisions"][:, 1:]
        for part in behind[numbers > 0].split(ROWS):
            logits = (part if head is None else head.logits(part)).float()
            found.silence += logits.softmax(-1)[:, quiet].sum(-1).tolist()
            found.silent += torch.isin(logits.argmax(-1), quiet).tolist()
        for number in numbers[numbers > 0].tolist():
            speaks, tag = decoded(number)
            found.speaks.append(speaks)
            found.tags.append(TAGS[tag])
    found.loss = total / max(count, 1)
    return found


def figures(decided: Decided, threshold: float | None = None) -> dict[str, float]:
    """Return the figures of decisions; with `threshold`, silence less likely than it is speech.

    `idle_precision`, `idle_recall`, `idle_f1` of the slices at which it is silent; `false_takeover`
    is how often it speaks where the user has not ended (`mid`, `pause`, `barge`), `takeover` how
    often where the user has (`end`, `side`); `right_TAG` how often it is right there. What there is
    no slice for isn't in it.
    """
    silent = silences(decided, threshold)
    rows = list(zip(silent, decided.speaks, decided.tags, strict=True))
    both = sum(quiet and not speaks for quiet, speaks, _ in rows)
    said, wanted = sum(silent), sum(not speaks for speaks in decided.speaks)
    found = {
        "idle_precision": both / max(said, 1),
        "idle_recall": both / max(wanted, 1),
        "idle_f1": 2 * both / max(said + wanted, 1),
    }
    for name, tags in (("false_takeover", UNFINISHED), ("takeover", ENDED)):
        chosen = [not quiet for quiet, _, tag in rows if tag in tags]
        if chosen:
            found[name] = sum(chosen) / len(chosen)
    for tag in TAGS:
        right = [quiet != speaks for quiet, speaks, own in rows if own == tag]
        if right:
            found[f"right_{tag}"] = sum(right) / len(right)
    return found


def silences(decided: Decided, threshold: float | None) -> list[bool]:
    """Return at which slices the model is silent."""
    if threshold is None:
        return decided.silent
    return [p >= threshold for p in decided.silence]


TOO_EARLY = 0.05
"""The share of unfinished turns that may be taken, where a threshold is chosen."""


def calibrate(decided: Decided) -> float | None:
    """Return the threshold with the fewest errors, None if nothing, or all, is to be said.

    Errors are weighed by where they are: the share of false takeovers, that of ends without an
    answer, and that of the others count alike. Of thresholds that are as good, the middle one.
    Those at which more than `TOO_EARLY` of the turns are taken too early are passed over, if there
    are others: an answer that is missing comes later (`max_wait`), one too early can't be unsaid.
    """
    if len(set(decided.speaks)) < 2:
        return None
    groups = {tag: 0 for tag in UNFINISHED} | {tag: 1 for tag in ENDED}
    rows = [
        (p, speaks, groups.get(tag, 2))
        for p, speaks, tag in zip(decided.silence, decided.speaks, decided.tags, strict=True)
    ]
    sizes = [max(sum(group == g for _, _, group in rows), 1) for g in range(3)]

    def errors(threshold: float) -> float:
        return sum((p < threshold) != speaks and 1 / sizes[group] for p, speaks, group in rows)

    grid = [1 / (1 + math.exp(-step / 10)) for step in range(-45, 46)]  # 0.011 to 0.989
    early = [
        sum(p < t and not speaks for p, speaks, group in rows if group == 0) / sizes[0]
        for t in grid
    ]
    bound = max(min(early), TOO_EARLY)
    grid = [t for t, share in zip(grid, early, strict=True) if share <= bound]
    costs = [errors(threshold) for threshold in grid]
    best = [t for t, cost in zip(grid, costs, strict=True) if cost <= min(costs) + 1e-9]
    return round(best[len(best) // 2], 4)
