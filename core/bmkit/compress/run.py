"""The compress engine: walk the checkpoint tensor by tensor, write a smaller one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from bmkit import model, plan
from bmkit.compress import pack
from bmkit.compress.recipe import CompressRecipe, Quantize
from bmkit.errors import InputError, RecipeError
from bmkit.nn import walk
from bmkit.nn.rounding import dequantize, quantize
from bmkit.plan import Headers, Job, Outcome
from bmkit.report import task


def run(job: Job) -> Outcome:
    """Apply the recipe's step to the model, writing into `job.out`.

    Peak memory: one output shard and four float32 copies of the largest layer.
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
    return METHODS[recipe.steps[0].method](job, headers, recipe.steps[0])


def _quantize(job: Job, headers: Headers, step: Quantize) -> Outcome:
    skeleton = model.empty_model(job.checkpoint)
    linears = walk.linears(skeleton)
    left = [n for n in linears if any(_ends(n, e) for e in step.exclude_modules)]
    for pattern in step.exclude_modules:
        if not any(_ends(n, pattern) for n in linears):
            raise RecipeError(f"exclude_modules: no linear layer's name ends in `{pattern}`")
    chosen = {f"{n}.weight" for n in linears if n not in left}
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    stored = {t.name for t in headers.tensors}
    if not chosen & stored and prefix != ".":
        chosen = {n.removeprefix(prefix) for n in chosen}
    if not chosen & stored:
        raise InputError(
            f"{job.checkpoint} has no linear layers that can be quantised",
            hint="models whose layers are Conv1D (GPT-2) are not covered",
        )
    if absent := sorted(chosen - stored):
        raise InputError(
            f"{job.checkpoint}: {len(absent)} linear layers have no weight of their own in the "
            f"checkpoint, as {absent[0]}",
            hint="name them in exclude_modules, to leave them as they are",
        )
    group = _group_size(step, [m.in_features for n, m in linears.items() if n not in left])
    device = model.pick_device(job.recipe.device)
    writer = model.ShardWriter(job.out)
    layers = before = after = 0
    error = energy = 0.0
    with task(
        job.reporter, f"quantize to {step.bits} bits", len(headers.tensors), "tensors"
    ) as bar:
        for name, tensor in model.tensors(headers):
            if name not in chosen:
                writer.add(name, tensor)
                bar.advance()
                continue
            weight = tensor.to(device)
            try:
                values, scale = quantize(weight, step.bits, group, scale_search=step.scale_search)
            except ValueError as exc:
                raise InputError(f"{job.checkpoint}: layer {name}: {exc}") from None
            difference = dequantize(values, scale) - weight.float()
            error += float(difference.square().sum())
            energy += float(weight.float().square().sum())
            layers += 1
            before += weight.numel() * 4
            for suffix, part in pack.pack(values, scale, step.bits).items():
                after += part.numel() * part.element_size()
                writer.add(f"{name.removesuffix('weight')}{suffix}", part.cpu())
            bar.advance()
    writer.close()
    model.copy_side_files(job.checkpoint, job.out)
    ignore = sorted({*walk.output_heads(skeleton), *left})
    config = dict(headers.config)
    config["quantization_config"] = pack.config(step.bits, group, ignore)
    (job.out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    metrics = {
        "layers": layers,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": round(after / before, 6),
        "weight_error": round((error / max(energy, 1e-30)) ** 0.5, 6),
    }
    return Outcome("model", metrics, ("transformers + compressed-tensors",))


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _group_size(step: Quantize, widths: list[int]) -> int | None:
    if step.group_size == "channel":
        return None
    sizes = (128, 64, 32) if step.group_size == "auto" else (step.group_size,)
    fits = [size for size in sizes if not any(width % size for width in widths)]
    if not fits:
        odd = next(w for w in widths if w % min(sizes))
        raise RecipeError(
            f"group_size {step.group_size} does not divide a layer with {odd} inputs",
            hint="write group_size: auto, or channel",
        )
    return fits[0]


METHODS: dict[str, Callable[[Job, Headers, Any], Outcome]] = {"quantize": _quantize}
