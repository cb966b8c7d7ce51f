"""The compress engine: step by step, each from one checkpoint to the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bmkit import model, plan, tables
from bmkit.artifact import EXPERTS
from bmkit.compress import measuring, pack
from bmkit.compress.options.experts import Moefy
from bmkit.compress.recipe import CompressRecipe
from bmkit.compress.steps import (
    blockwise,
    experts,
    foreign,
    gates,
    learning,
    rounding,
    scaling,
    shrink,
    sparse,
    structure,
)
from bmkit.compress.work import Metrics, Shared, Work
from bmkit.errors import GateError
from bmkit.nn import products
from bmkit.place import write_text
from bmkit.plan import Job, Outcome
from bmkit.runtime.placed.load import empty
from bmkit.runtime.placed.origin import Origin

CALIBRATED = ("gptq", "awq", "smoothquant", "wanda", "sparsegpt")
"""Methods that only read texts; those that train choose their products themselves."""


def run(job: Job) -> Outcome:
    """Apply the recipe's steps to the model, writing the last one's result into `job.out`.

    Results of earlier steps lie in `job.work`, and a stopped run goes on behind the last whole one.
    Peak memory of rounding: one output shard and four float32 copies of the largest layer.
    """
    recipe = job.recipe
    assert isinstance(recipe, CompressRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    Origin(job.checkpoint, empty(job.checkpoint)).require_shapes()
    shared = Shared(job, recipe, model.pick_device(recipe.device))
    source = job.checkpoint
    made = [("before", source)]
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
            with products.quick() if step.method in CALIBRATED else nullcontext():
                found = METHODS[step.method](Work(source, out, folder, shared, i), step)
            if not last:
                write_text(note, json.dumps(found))
        else:
            found = plan.read_json(note)
        metrics |= found
        source = out
        made.append((step.method, out))
    with products.quick():
        lines = measuring.accounts(shared, made)
    for text in tables.lines(lines):
        job.reporter.info(text)
    metrics |= _summary(lines)
    if "perplexity_ratio" in metrics:
        _refuse_loss(recipe, metrics)
    elif any(isinstance(step, Moefy) for step in recipe.steps):
        job.reporter.warn("this model has no perplexity: max_loss bounds nothing, look at `energy`")
    return Outcome("model", metrics, _loads_in(job.out), table=lines)


def _loads_in(out: Path) -> tuple[str, ...]:
    """Say what else than bmkit loads a checkpoint."""
    config = plan.read_json(out / "config.json").get("quantization_config")
    if not config:
        divided = (out / EXPERTS).is_file()
        return ("transformers, all neurons computed" if divided else "transformers",)
    if (method := config["quant_method"]) in LOADERS:
        return LOADERS[method]
    formats = {group["format"] for group in config["config_groups"].values()}
    ours = {pack.LAYOUT, pack.TWO_OF_FOUR} & formats
    return ("bmkit",) if ours else ("transformers + compressed-tensors",)


def _summary(lines: Sequence[Metrics]) -> Metrics:
    """Return the figures of the last line, beside those of the first where gates want both."""
    first, last = lines[0], lines[-1]
    found: dict[str, float | int | str] = {
        "disk_bytes": last["bytes"],
        "disk_ratio": round(float(last["bytes"]) / float(first["bytes"]), 6),
        "parameters": last["parameters"],
        "nonzeros": last["nonzeros"],
        "flops_per_token": last["flops_per_token"],
    }
    for key in ("perplexity", "decode", "prefill"):
        if key in first and key in last:
            ratio = float(last[key]) / max(float(first[key]), 1e-30)
            found |= {f"{key}_before": first[key], key: last[key], f"{key}_ratio": round(ratio, 4)}
    return found


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


LOADERS = {
    "quanto": ("optimum-quanto",),
    "gptq": ("transformers + gptqmodel", "vllm"),
}
"""What else loads the formats of other libraries."""
METHODS: dict[str, Callable[[Work, Any], Metrics]] = {
    "quantize": rounding.run,
    "awq": scaling.run,
    "smoothquant": scaling.run,
    "gptq": blockwise.run,
    "quanto": foreign.quanto,
    "optimum_gptq": foreign.optimum_gptq,
    "magnitude": sparse.run,
    "wanda": blockwise.run,
    "sparsegpt": blockwise.run,
    "drop_layers": structure.drop_layers,
    "shrink": shrink.run,
    "gates": gates.run,
    "frequent_tokens": structure.frequent_tokens,
    "moefy": experts.run,
    "distill": learning.distill,
}
