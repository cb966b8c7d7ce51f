"""Texts behind a prompt: learned from targets, generated and measured (`task: generation`).

Conditional generation with soft prompts, prefixes or any delta (prefix tuning, arXiv 2101.00190).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmkit import model as models
from bmkit import report
from bmkit.errors import InputError
from bmkit.plan import Job, Outcome
from bmkit.prompt import stored, texts, training
from bmkit.prompt.opening import open_model
from bmkit.prompt.ready import Ready
from bmkit.prompt.rounds import Done, Labels, Round, each, rounds
from bmkit.prompt.tasks import Generate, longest
from bmkit.prompt.texts import Writer
from bmkit.runtime.generate import Generation
from bmkit.verbalizers import overlap


def run(job: Job) -> Outcome:
    """Train the recipe's prompt on targets, measure what it says, and write it into `job.out`.

    Peak memory: the dense model in the compute dtype, and the activations of one batch.
    """
    ready = Ready(job)
    require_writes(ready.kind)
    wanted = {n: [texts.texts_of(r) for r in s.records] for n, s in ready.splits.items()}
    forced = getattr(models.load_generation_config(job.checkpoint), "forced_bos_token_id", None)
    encoded: dict[str, list[Any]] = {
        name: texts.aimed(
            ready.prompts, s.records, ready.kind, ready.recipe.generate.max_new_tokens, forced
        )
        for name, s in ready.splits.items()
    }
    held = {n: own for n, own in encoded.items() if n != "train" or ready.learns}
    right: dict[str, Labels] = {n: [(at,) for at in range(len(o))] for n, o in held.items()}
    found = rounds(ready, encoded, right)
    targets = {id(p): w for n, own in encoded.items() for p, w in zip(own, wanted[n], strict=True)}

    def perform(one: Round, out: Path, work: Path) -> Done:
        if len(found) > 1:
            job.reporter.info(f"seed {one.seed}")
        return _perform(job, ready, one, targets, out, work)

    done = each(found, job.out, job.work, perform)
    metrics = {name: value for name, value in done.metrics.items() if name != "accuracy_sd"}
    return Outcome("prompt", metrics, ("bmkit",), table=done.table)


def _perform(
    job: Job,
    ready: Ready,
    one: Round,
    wanted: Mapping[int, list[str]],
    out: Path,
    work: Path,
) -> Done:
    recipe = ready.recipe
    size = recipe.train.per_device_eval_batch_size
    most = longest(recipe.task, recipe.template.max_seq_length, recipe.generate)
    opened = open_model(job, ready.kind, ready.tokenizer, size, most)
    asker = opened.asker
    training.attach(job, ready, asker, one.seed)
    metrics: dict[str, Any] = {}
    if recipe.tune.mode != "none":
        metrics |= training.learn(job, ready, asker, Writer(), one, work)
    trained = training.write(ready, asker, None, out)
    if ready.learns:
        trained["seed"] = one.seed
    how = generation(recipe.generate, recipe.seed)
    total = sum(len(rows.prompts) for rows in one.measured.values())
    with report.task(job.reporter, "prompt", total, "rows") as bar:
        for name, rows in one.measured.items():
            said = texts.answers(asker, ready.tokenizer, rows.prompts, how, size, done=bar.advance)
            figures = overlap.measure(
                [answer.text.strip() for answer in said], [wanted[id(p)] for p in rows.prompts]
            )
            prefix = "" if name == "test" else f"{name}_"
            metrics |= {f"{prefix}{figure}": value for figure, value in figures.items()}
            metrics[f"{prefix}rows"] = len(said)
    opened.close()
    measured = [p for rows in one.measured.values() for p in rows.prompts]
    metrics["rows_truncated"] = sum(p.cut > 0 for p in measured)
    metrics["tokens"] = sum(len(p.ids) for p in measured)
    stored.write(out, ready.kept(None, **trained))
    return Done(metrics, [])


def generation(spec: Generate, seed: int) -> Generation:
    """Return how answers are made that are measured: the likeliest token, always."""
    more = {"min_new_tokens": spec.min_new_tokens} if spec.min_new_tokens else {}
    return Generation(
        spec.max_new_tokens, more=more, stop_strings=tuple(spec.stop_strings), seed=seed
    )


def require_writes(kind: str) -> None:
    """Raise InputError for a model that can't go on with a text."""
    if kind == "masked":
        raise InputError(
            "task: generation: a model that fills in masks says no texts",
            hint="take a causal or a seq2seq one",
        )
