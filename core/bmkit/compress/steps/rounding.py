"""Round to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from bmkit import model
from bmkit.compress import pack
from bmkit.compress.calibrate import Blocks
from bmkit.compress.options.rounding import Gptq, Quantize
from bmkit.compress.work import Metrics, Scope, Work, scope, write_config
from bmkit.errors import InputError, RecipeError
from bmkit.nn import walk
from bmkit.nn.rounding import Grid, Rounded, round_matrix
from bmkit.report import task


def run(work: Work, step: Quantize) -> Metrics:
    """Round the weights of all linear layers, tensor by tensor."""
    job, source = work.job, work.source
    found = scope(source, step.exclude_modules)
    headers = found.headers
    grid = grid_of(step, found.widths)
    extra = tables(found) if step.embeddings else {}
    inputs = _input_scales(work, found) if step.activations == "static" else {}
    device = work.shared.device
    writer = model.ShardWriter(work.out)
    count = before = after = kept = 0
    error = energy = 0.0
    with task(
        job.reporter, f"quantize to {step.bits} bits", len(headers.tensors), "tensors"
    ) as bar:
        for name, tensor in model.tensors(headers):
            if name not in found.chosen and name not in extra:
                writer.add(name, tensor)
                bar.advance()
                continue
            weight = tensor.to(device)
            own = pack.TABLE if name in extra else grid
            try:
                rounded = round_matrix(weight, own)
            except ValueError as exc:
                raise InputError(f"{source}: layer {name}: {exc}") from None
            difference = rounded.dense() - weight.float()
            error += float(difference.square().sum())
            energy += float(weight.float().square().sum())
            count += 1
            before += weight.numel() * 4
            parts = packed(step, rounded, own)
            kept += "weight_kept" in parts
            if step.activations:
                parts = pack.integers(rounded, inputs.get(name))
            for suffix, part in parts.items():
                after += part.numel() * part.element_size()
                writer.add(f"{name.removesuffix('weight')}{suffix}", part.cpu())
            bar.advance()
    writer.close()
    require_kept(step, kept)
    model.copy_side_files(source, work.out)
    ignore = sorted({*walk.output_heads(found.skeleton), *found.left} - set(extra.values()))
    config = dict(headers.config)
    config["quantization_config"] = pack.config(
        grid, ignore, extra.values(), kept=step.layout == "packed"
    )
    if step.activations:
        dynamic = step.activations == "dynamic"
        config["quantization_config"] = pack.config_of_integers(ignore, dynamic=dynamic)
    write_config(work.out, config)
    return {
        "layers": count,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": round(after / before, 6),
        "weight_error": round((error / max(energy, 1e-30)) ** 0.5, 6),
    }


def packed(step: Quantize | Gptq, found: Rounded, grid: Grid) -> dict[str, Tensor]:
    """Return the tensors of a layer in the layout that `step` wants, by their suffix."""
    kept = pack.pack_kept(found, grid) if step.layout == "packed" and grid.bits in (4, 8) else None
    return kept or pack.pack(found, grid)


def require_kept(step: Quantize | Gptq, kept: int) -> None:
    """Raise RecipeError if a layout is wanted that no layer has come to."""
    if step.layout == "packed" and not kept:
        raise RecipeError(
            "layout: packed: no layer has two zeros in each four weights, or they aren't of 4 or 8 "
            "bits",
            hint='let a step with `pattern: "2:4"` go before, or leave the layout out',
        )


def _input_scales(work: Work, found: Scope) -> dict[str, float]:
    """Return what rounds the inputs of each layer, by the stored name of its weight.

    Raises InputError for layers outside of the blocks, which no text is seen to go through.
    """
    scales: dict[str, float] = {}
    blocks = Blocks(work.source, work.shared.rows, device=work.shared.device, both=True)
    with task(work.job.reporter, "look at what goes into layers", blocks.count, "blocks") as bar:
        for block in blocks.visit():
            names = [n for n in block.linears if n not in found.left]
            for name, largest in blocks.largest(block, names).items():
                stored = blocks.stored(name)
                if stored is not None:
                    scales[stored] = max(float(largest.max()), 1e-12) / 127
            bar.advance()
    if absent := sorted(found.chosen - set(scales)):
        raise InputError(
            f"{work.source}: {absent[0]} is outside of the blocks, its inputs are not seen",
            hint="name it in exclude_modules, or use activations: dynamic",
        )
    return scales


def tables(found: Scope) -> dict[str, str]:
    """Return the modules that have a row for every token, by the stored names of their weights.

    Raises InputError for a model without them.
    """
    names = walk.tables(found.skeleton)
    stored = {t.name for t in found.headers.tensors}
    prefix = f"{getattr(found.skeleton, 'base_model_prefix', '')}."
    rows = {}
    for name in names:
        for key in (f"{name}.weight", f"{name.removeprefix(prefix)}.weight"):
            if key in stored:
                rows[key] = name
                break
    if not rows:
        raise InputError(f"{found.headers.path} has no embeddings that can be rounded")
    return rows


def grid_of(step: Quantize | Gptq, widths: list[int]) -> Grid:
    """Return what the weights of layers with `widths` inputs are rounded to.

    Raises RecipeError if the group size doesn't divide one of them.
    """
    group = group_size(step.group_size, widths)
    dtype = step.scale_dtype
    if dtype == "auto":
        dtype = "float32" if group is None else "bfloat16"
    return Grid(
        step.bits,
        group,
        symmetric=step.symmetric,
        scale_search=step.scale_search,
        scale_dtype=getattr(torch, dtype),
    )


def group_size(wanted: str | int, widths: list[int]) -> int | None:
    """Return how many inputs share a scale, none if all of a row do.

    Raises RecipeError if that doesn't divide one of `widths`.
    """
    if wanted == "channel":
        return None
    sizes = (128, 64, 32) if wanted == "auto" else (int(wanted),)
    fits = [size for size in sizes if not any(width % size for width in widths)]
    if not fits:
        odd = next(w for w in widths if w % min(sizes))
        other = "channel" if any(w % 32 for w in widths) else "auto, or channel"
        raise RecipeError(
            f"group_size {wanted} does not divide a layer with {odd} inputs",
            hint=f"write group_size: {other}, or name such layers in exclude_modules",
        )
    return fits[0]
