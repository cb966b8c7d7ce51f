"""Prompts that tell labels together: each is made as one alone, and all are kept (PET)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bmkit.errors import BmkitError
from bmkit.plan import Job
from bmkit.prompt import kept, rounds, softlabels
from bmkit.prompt.kept import KeptEnsemble, KeptMember
from bmkit.prompt.measure import measure
from bmkit.prompt.ready import Ready
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompt.rounds import Done, Perform, Round, Rows, Table
from bmkit.prompt.together import Ensemble
from bmkit.verbalizers import together

TOLD = "told.safetensors"
"""What a run has told of rows, in the directory that outlives it: by split, [rows, labels]."""


@dataclass(frozen=True)
class Prepared:
    """A recipe of one prompt: all that is ready without the model, its runs, what performs one."""

    ready: Ready
    every: Sequence[Ready]
    """With each template that is given: those that a search tries, else the one."""
    runs: Sequence[Round]
    perform: Perform


@dataclass(frozen=True)
class _Member:
    """A member that is done: where it is, and what it has said."""

    name: str
    one: Round
    done: Done
    told: Mapping[str, Tensor]


def run(job: Job, prepare: Callable[[Job], Prepared]) -> Done:
    """Make all prompts of the recipe's ensemble, each with every seed, and measure them together.

    Members go to `job.out`. Those that were done before a run was killed aren't done again.
    """
    recipe = job.recipe
    assert isinstance(recipe, PromptRecipe)
    assert recipe.ensemble is not None  # the caller has looked
    parts = [_prepared(job, recipe, n, prepare) for n in range(1 + len(recipe.ensemble.members))]
    every = [own for part in parts for own in part.every]
    names = softlabels.fields(every) if recipe.data.unlabelled else []
    members: list[_Member] = []
    for number, part in enumerate(parts):
        for one in part.runs:
            name = f"{number}-seed-{one.seed}" if part.ready.learns else str(number)
            job.reporter.info(f"member {name}")
            done = rounds.once(one, job.work / name, part.perform)
            shutil.copytree(job.work / name / "kept", job.out / kept.MEMBERS / name)
            told = load_file(job.work / name / TOLD) if (job.work / name / TOLD).is_file() else {}
            members.append(_Member(name, one, done, told))
    weights = _weights(recipe.ensemble, members)
    ready, several = parts[0].ready, recipe.task == "multilabel"
    said = _together(recipe, members, weights)
    _write(job.out, recipe.ensemble, members, weights)
    if names:
        records = ready.splits["unlabelled"].records
        softlabels.write(job.out, records, names, ready.classes.names, said["unlabelled"])
    listed = [*ready.classes.names]
    return _measured(members, weights, said, listed, several, none=recipe.data.none)


def _prepared(
    job: Job, recipe: PromptRecipe, number: int, prepare: Callable[[Job], Prepared]
) -> Prepared:
    """Prepare one of the ensemble's prompts. An error of a member's own names the member."""
    try:
        return prepare(_alone(job, recipe, number))
    except BmkitError as exc:
        if number and exc.key is not None and exc.key.partition(".")[0] in recipe.member(number):
            exc.key = f"ensemble.members.{number - 1}.{exc.key}"
        raise


def _alone(job: Job, recipe: PromptRecipe, number: int) -> Job:
    """Return the job of one of the ensemble's prompts."""
    own = {**recipe.member(number), "ensemble": recipe.ensemble}
    gone = [key for key in ("template", "verbalizer") if key in own]
    files = {k: v for k, v in job.files.items() if k.partition(".")[0] not in gone}
    return replace(job, recipe=recipe.model_copy(update=own), files=files)


def _weights(spec: Ensemble, members: Sequence[_Member]) -> list[float]:
    if spec.weights == "equal":
        return [1.0 / len(members)] * len(members)
    found = [float(member.done.metrics[spec.weights]) for member in members]
    total = sum(found)
    return [value / total if total else 1.0 / len(members) for value in found]


def _together(
    recipe: PromptRecipe, members: Sequence[_Member], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return what all tell together of the rows that all were asked, by split."""
    assert recipe.ensemble is not None
    over, several = recipe.ensemble.aggregate, recipe.task == "multilabel"
    splits = set(members[0].told)
    if recipe.data.dev is None and len(recipe.learning_setting.seeds) > 1:
        splits -= {"dev"}  # each seed has drawn another
    return {
        split: together.mean(
            torch.stack([member.told[split] for member in members]), weights, over, several=several
        )
        for split in sorted(splits)
    }


def _write(
    folder: Path, spec: Ensemble, members: Sequence[_Member], weights: Sequence[float]
) -> None:
    listed = [
        KeptMember(name=member.name, weight=round(weight, 9))
        for member, weight in zip(members, weights, strict=True)
    ]
    kept.write(folder, KeptEnsemble(aggregate=spec.aggregate, members=listed))


def _measured(
    members: Sequence[_Member],
    weights: Sequence[float],
    said: Mapping[str, Tensor],
    labels: Sequence[str],
    several: bool,
    none: str | None,
) -> Done:
    """Return the figures of all together, with a line for each member, and for each label.

    What isn't told together, as the loss in training, is the mean of the members'.
    """
    alone = ("accuracy", "_f1", "rows")
    means = rounds.mean([member.done.metrics for member in members])
    metrics: dict[str, Any] = {n: v for n, v in means.items() if not n.endswith(alone)}
    for name in ("tokens", "rows_truncated"):
        metrics[name] = sum(member.done.metrics[name] for member in members)
    table: Table = [
        {"step": member.name, "weight": round(w, 6), **rounds.figures(member.done.metrics)}
        for member, w in zip(members, weights, strict=True)
    ]
    for split, own in members[0].one.measured.items():
        if split not in said:
            continue
        figures, lines = measured(split, said[split], own, labels, several, none)
        metrics = {**figures, **metrics}
        table += lines
    return Done({**metrics, "members": len(members)}, table)


def measured(
    split: str,
    logprobs: Tensor,
    rows: Rows,
    labels: Sequence[str],
    several: bool,
    none: str | None = None,
) -> tuple[dict[str, Any], Table]:
    """Return the figures of a split, of dev by `dev_…`, and its lines, by what all have told."""
    told = together.chosen(logprobs, several=several)
    figures, lines = measure(told, rows.right, labels, none)
    prefix = "" if split == "test" else f"{split}_"
    found = {f"{prefix}{name}": value for name, value in figures.items()}
    found[f"{prefix}rows"] = len(rows.right)
    return found, [{**line, "step": f"{split}: {line['step']}"} for line in lines]
