"""The prompt engine: a template and label words on a model, trained, calibrated and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit import report
from bmkit.plan import Job, Outcome
from bmkit.prompt import stored, training, wording
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.measure import measure
from bmkit.prompt.opening import Opened, open_model
from bmkit.prompt.ready import Ready
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompt.refined import knowledgeable
from bmkit.prompt.rounds import Done, Round, Rows, each, rounds
from bmkit.prompt.rules import Rules
from bmkit.prompt.states import States
from bmkit.prompting.encode import Encoded
from bmkit.registry import load
from bmkit.verbalizers import automatic, calibration, manual
from bmkit.verbalizers.prototypes import Prototypes
from bmkit.verbalizers.softwords import SoftWords

METHODS = {
    "manual": manual.label_logprobs,
    "one_to_one": manual.label_logprobs,
    "knowledgeable": knowledgeable,
    "automatic": automatic.search,
    "soft": SoftWords,
    "prototypical": Prototypes,
    "ptr": Rules,
    "generation": Rules,
    "content_free": calibration.prior,
    "contextual": calibration.prior,
}

TASKS = {"probing": "bmkit.prompt.probing:run", "generation": "bmkit.prompt.generating:run"}
"""By task, what performs a recipe without labels."""


def run(job: Job) -> Outcome:
    """Train and calibrate the recipe's prompt, measure it, and write it into `job.out`.

    Peak memory: the dense model in the compute dtype, and the activations of one batch.
    """
    recipe = job.recipe
    assert isinstance(recipe, PromptRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    if (way := TASKS.get(recipe.task)) is not None:
        outcome: Outcome = load(way)(job)
        return outcome
    ready = Ready(job)
    encoded = {name: ready.prompts.encode(s.records) for name, s in ready.splits.items()}
    found = rounds(ready, encoded, ready.right())
    prior = ready.prior_prompts(encoded)
    if not found[0].measured:
        job.reporter.warn("nothing is measured: there is no data.test and no data.dev")
    if ready.handler != "likelihood" and any(p.behind for own in encoded.values() for p in own):
        job.reporter.warn(
            "the model doesn't read what is behind the mask: multi_token_handler: likelihood does"
        )

    def perform(one: Round, out: Path, work: Path) -> Done:
        if len(found) > 1:
            job.reporter.info(f"seed {one.seed}")
        return _perform(job, ready, one, prior, out, work)

    done = each(found, job.out, job.work, perform)
    return Outcome("prompt", done.metrics, ("bmkit",), table=done.table)


def _perform(
    job: Job, ready: Ready, one: Round, prior: list[Encoded], out: Path, work: Path
) -> Done:
    """Perform one run: open the model, train, measure, and write what is kept into `out`."""
    recipe = ready.recipe
    size, most = recipe.train.per_device_eval_batch_size, recipe.template.max_seq_length
    opened = open_model(job, ready.kind, ready.tokenizer, size, most)
    asker = opened.asker
    training.attach(job, ready, asker, one.seed)
    told = wording.begun(ready, asker, one.train, prior, one.seed)
    metrics: dict[str, Any] = {}
    if prior and isinstance(told, Verbalizer):
        told = told.calibrated(_ask(job, opened, told, {"calibrate": prior})["calibrate"])
    if recipe.tune.mode != "none":
        metrics |= training.learn(job, ready, asker, told, one, work)
    trained = training.write(ready, asker, told, out)
    if ready.learns:
        trained["seed"] = one.seed
    said = _ask(job, opened, told, {name: rows.prompts for name, rows in one.measured.items()})
    opened.close()
    figures, table = _measured(ready, told, said, one.measured)
    measured = [p for rows in one.measured.values() for p in rows.prompts]
    metrics |= figures
    if isinstance(told, Verbalizer):
        metrics["label_words"] = len(told.words.flat)
    metrics["rows_truncated"] = sum(p.cut > 0 for p in measured)
    metrics["tokens"] = sum(len(p.ids) for p in measured)
    stored.write(out, ready.kept(told, **trained))
    return Done(metrics, table)


def _ask(
    job: Job, opened: Opened, told: Verbalizer | States, asked: Mapping[str, Sequence[Encoded]]
) -> dict[str, Tensor]:
    """Return what the model says of each group of prompts."""
    total = sum(map(len, asked.values()))
    with report.task(job.reporter, "prompt", total, "rows") as bar:
        return {n: told.ask(opened.asker, prompts, bar.advance) for n, prompts in asked.items()}


def _measured(
    ready: Ready,
    told: Verbalizer | States,
    said: Mapping[str, Tensor],
    measured: Mapping[str, Rows],
) -> tuple[dict[str, Any], list[dict[str, float | int | str]]]:
    """Return the figures of test, of dev by `dev_…`, and a line for each split and label."""
    metrics: dict[str, Any] = {}
    table: list[dict[str, float | int | str]] = []
    for name, own in measured.items():
        logprobs = told.label_logprobs(said[name])
        chosen = told.chosen(logprobs)
        found = ready.tagged(name, own.right, chosen, logprobs.amax(-1).tolist())
        if found is None:
            found = measure(chosen, own.right, told.labels, ready.recipe.data.none)
        figures, lines = found
        prefix = "" if name == "test" else f"{name}_"
        metrics |= {f"{prefix}{figure}": value for figure, value in figures.items()}
        metrics[f"{prefix}rows"] = len(own.right)
        table += [{**line, "step": f"{name}: {line['step']}"} for line in lines]
    return metrics, table
