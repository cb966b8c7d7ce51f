"""Move sizes from inputs to weights, block by block, with the model's function unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bmkit import model, plan
from bmkit.compress.calibrate import Block, Blocks
from bmkit.compress.folding import Place, changed, fold, places
from bmkit.compress.options.rounding import Gptq, Quantize
from bmkit.compress.options.scaling import Awq, SmoothQuant
from bmkit.compress.steps.rounding import grid_of
from bmkit.compress.work import Metrics, Work, scope
from bmkit.errors import InputError
from bmkit.nn.rounding import Grid
from bmkit.nn.scaling import activation_aware, smooth
from bmkit.report import task


def run(work: Work, step: Awq | SmoothQuant) -> Metrics:
    """Scale the blocks of the model for the rounding that comes next."""
    rounding = work.shared.recipe.steps[work.number + 1]
    assert isinstance(rounding, Quantize | Gptq)  # the recipe has been checked
    found = scope(work.source, rounding.exclude_modules)
    grid = grid_of(rounding, found.widths)
    work.folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(work.source, work.shared.rows, device=work.shared.device, both=True)
    known: dict[frozenset[str], list[Place]] = {}
    where: dict[str, Path] = {}
    left: list[float] = []
    with task(work.job.reporter, step.method, blocks.count, "blocks") as bar:
        for block in blocks.visit():
            file = work.folder / f"block-{block.number:05}.safetensors"
            if not file.is_file():
                kind = frozenset(name for name, _ in block.module.named_modules())
                if kind not in known:
                    known[kind] = places(block.module, partial(blocks.through, block))
                errors = _scale(blocks, block, known[kind], step, grid, set(found.left))
                _keep(file, blocks, block, known[kind], errors)
            kept = load_file(file)
            where |= dict.fromkeys(kept, file)
            _put(blocks, block, kept)  # as it is stored, of a stopped run too
            left += plan.read_json(file.with_suffix(".json"))["errors"]
            bar.advance()
    if not left:
        raise InputError(
            f"{work.source}: no norm and no layer was found whose outputs can be scaled",
            hint=f"leave {step.method} out",
        )
    writer = model.ShardWriter(work.out)
    for name, tensor in model.tensors(found.headers):
        if name in where:
            with safe_open(where[name], framework="pt") as stream:
                tensor = stream.get_tensor(name)
        writer.add(name, tensor)
    writer.close()
    model.copy_side_files(work.source, work.out)
    metrics: dict[str, float | int | str] = {"places": len(left)}
    if isinstance(step, Awq):
        metrics["error_left"] = round((sum(e**2 for e in left) / len(left)) ** 0.5, 6)
    return metrics


def _scale(
    blocks: Blocks,
    block: Block,
    known: list[Place],
    step: Awq | SmoothQuant,
    grid: Grid,
    excluded: set[str],
) -> list[float]:
    """Scale a block in place; return what is left of the rounding error at each place."""
    prefix = f"{blocks.places[block.number]}."
    chosen = [p for p in known if not any(prefix + t in excluded for t in p.takers)]
    names = [prefix + t for p in chosen for t in p.takers[:1]]
    seen = blocks.observe(block, names) if isinstance(step, Awq) else {}
    largest = {} if isinstance(step, Awq) else blocks.largest(block, names)
    errors = []
    for place in chosen:
        weights = [block.linears[prefix + t].weight.data for t in place.takers]
        first = prefix + place.takers[0]
        try:
            if isinstance(step, Awq):
                factors, left = activation_aware(
                    weights, seen[first].hessian, grid, tries=step.tries
                )
                left = left**0.5
            else:
                factors, left = smooth(largest[first], weights, step.alpha), 1.0
        except ValueError as exc:
            raise InputError(f"{blocks.path}: layer {first}: {exc}") from None
        kept = fold(block.module, place, factors, lambda: blocks.through(block))
        errors.append(left if kept is not None else 1.0)
    return errors


def _put(blocks: Blocks, block: Block, kept: Mapping[str, Tensor]) -> None:
    """Let a block compute with what was kept of it."""
    prefix = f"{blocks.places[block.number]}."
    for name, parameter in block.module.named_parameters():
        stored = blocks.origin.plain.get(prefix + name)
        if stored is not None and stored in kept:
            parameter.data = kept[stored].to(parameter.device, parameter.dtype)


def _keep(
    file: Path, blocks: Blocks, block: Block, known: list[Place], errors: list[float]
) -> None:
    """Write what has changed of a block, by stored names and in stored dtypes."""
    parts: dict[str, Tensor] = {}
    for name, value in changed(block.module, known).items():
        whole = f"{blocks.places[block.number]}.{name}"
        stored = blocks.origin.plain.get(whole)
        if stored is None:
            raise InputError(f"{blocks.path} has no tensor of its own for {whole}")
        if not torch.isfinite(value).all():
            raise InputError(f"{blocks.path}: {whole} holds NaN or infinite weights")
        parts[stored] = value.to(blocks.dtype(stored)).cpu().contiguous()
    file.with_suffix(".json").write_text(json.dumps({"errors": errors}), encoding="utf-8")
    model.save_tensors(file, parts)
