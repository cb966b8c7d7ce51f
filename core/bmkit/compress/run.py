"""The compress engine: step by step, each from one checkpoint to the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bmkit import model, plan
from bmkit.compress import calibrate, perplexity
from bmkit.compress.options.experts import Moefy
from bmkit.compress.recipe import ROUNDING, CompressRecipe
from bmkit.compress.steps import blockwise, experts, learning, rounding, sparse, structure
from bmkit.compress.work import Metrics, Shared, Work
from bmkit.errors import GateError, InputError
from bmkit.plan import Job, Outcome
from bmkit.runtime.voice import Voice

EVALUATED = 32
"""Rows that perplexity is measured on, at most."""


def run(job: Job) -> Outcome:
    """Apply the recipe's steps to the model, writing the last one's result into `job.out`.

    Results of earlier steps lie in `job.work`, and a stopped run goes on behind the last whole one.
    Peak memory of rounding: one output shard and four float32 copies of the largest layer.
    """
    recipe = job.recipe
    assert isinstance(recipe, CompressRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    headers = plan.read_headers(job.checkpoint)
    if headers.config.get("quantization_config"):
        raise InputError(
            f"{job.checkpoint} is quantised already", hint="compress the model it was made from"
        )
    shared = Shared(job, recipe, model.pick_device(recipe.device))
    source = job.checkpoint
    metrics: dict[str, float | int | str] = {}
    for i, step in enumerate(recipe.steps):
        last = i == len(recipe.steps) - 1
        out, note = job.work / f"step-{i}", job.work / f"step-{i}.json"
        if last:
            out = job.out
        elif note.is_file():
            job.reporter.info(f"{step.method}: done by an earlier run")
        if last or not note.is_file():
            if not last:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
            folder = job.work / f"part-{i}"
            found = METHODS[step.method](Work(source, out, folder, shared), step)
            if not last:
                note.write_text(json.dumps(found), encoding="utf-8")
        else:
            found = plan.read_json(note)
        metrics |= found
        source = out
    kinds = {step.method for step in recipe.steps}
    if shared.has_rows and shared.generates and ("distill" not in kinds or "moefy" in kinds):
        metrics |= _perplexities(shared, job.out)
        _refuse_loss(recipe, metrics)
    elif "moefy" in kinds:
        job.reporter.warn("this model has no perplexity: max_loss bounds nothing, look at `energy`")
    loads = "transformers + compressed-tensors" if kinds & set(ROUNDING) else "transformers"
    return Outcome("model", metrics, (loads,))


def _perplexities(shared: Shared, out: Path) -> Metrics:
    """Measure perplexity on the rows that nothing was fitted to, of the model before and after."""
    rows = shared.rows
    held = sorted(calibrate.held_out(len(rows))) or [len(rows) - 1]
    chosen = [rows[i].tolist() for i in held[:EVALUATED]]
    before, after = (
        perplexity.of(
            Voice(
                path,
                device=shared.device,
                dtype=shared.recipe.dtype,
                rows=1,
                reporter=shared.job.reporter,
            ),
            chosen,
        )
        for path in (shared.job.checkpoint, out)
    )
    shared.job.reporter.info(f"perplexity on rows held out: {before:.3f} before, {after:.3f} after")
    return {
        "perplexity_before": round(before, 4),
        "perplexity": round(after, 4),
        "perplexity_ratio": round(after / before, 4),
    }


def _refuse_loss(recipe: CompressRecipe, metrics: Mapping[str, float | int | str]) -> None:
    """Raise GateError if computing by experts costs more than a `moefy` step allows."""
    for step in recipe.steps:
        if isinstance(step, Moefy) and float(metrics["perplexity_ratio"]) > step.max_loss:
            share, ratio = float(metrics["active"]), metrics["perplexity_ratio"]
            raise GateError(
                f"moefy: with {share:.0%} of the neurons computed perplexity is {ratio} times as "
                f"high, {metrics['perplexity']} in the place of {metrics['perplexity_before']}; "
                f"max_loss is {step.max_loss}, so nothing is written",
                hint="raise `active`, lower `size`, let a `distill` step follow, or raise max_loss",
            )


METHODS: dict[str, Callable[[Work, Any], Metrics]] = {
    "quantize": rounding.run,
    "gptq": blockwise.run,
    "magnitude": sparse.run,
    "wanda": blockwise.run,
    "sparsegpt": blockwise.run,
    "drop_layers": structure.drop_layers,
    "frequent_tokens": structure.frequent_tokens,
    "moefy": experts.run,
    "distill": learning.distill,
}
