"""Compress block by block on calibration text."""

from __future__ import annotations

from bmkit import model
from bmkit.compress import calibrate, layerwise, pack
from bmkit.compress.options.rounding import Gptq
from bmkit.compress.steps.rounding import grid_of, packed, require_kept, tables
from bmkit.compress.work import Metrics, Work, scope, write_config
from bmkit.nn import walk
from bmkit.nn.rounding import Rounded, round_matrix


def run(work: Work, step: layerwise.Layerwise) -> Metrics:
    """Compress the linear layers of all blocks, each on what comes out of those before it."""
    shared, source, reporter = work.shared, work.source, work.job.reporter
    scoped = scope(source, step.exclude_modules)
    headers, skeleton, linears, left = (
        scoped.headers,
        scoped.skeleton,
        scoped.linears,
        scoped.left,
    )
    widths = scoped.widths
    grid = grid_of(step, widths) if isinstance(step, Gptq) else None
    fitted = shared.rows.numel() * (calibrate.HELD_OUT - 1) // calibrate.HELD_OUT
    if fitted < layerwise.TOKENS_AN_INPUT * max(widths):
        reporter.warn(
            f"{fitted} tokens to calibrate on are few: a layer has {max(widths)} inputs, and "
            f"{layerwise.TOKENS_AN_INPUT} tokens for each are wanted; raise data.tokens"
        )
    where, found = layerwise.walk_blocks(
        source,
        step,
        shared.rows,
        left,
        grid,
        work.folder,
        device=shared.device,
        reporter=reporter,
    )
    writer = model.ShardWriter(work.out)
    extra = tables(scoped) if isinstance(step, Gptq) and step.embeddings else {}
    before = after = kept = 0
    for name, tensor in model.tensors(headers):
        if name not in where and name not in extra:
            writer.add(name, tensor)
            continue
        before += 4 * tensor.numel()
        if name in extra:
            parts = pack.pack(round_matrix(tensor, pack.TABLE), pack.TABLE)
        else:
            parts = layerwise.read(where[name], name)
            if grid is not None and isinstance(step, Gptq):
                parts = packed(step, Rounded(**parts), grid)
                kept += "weight_kept" in parts
        for suffix, part in parts.items():
            after += part.numel() * part.element_size()
            writer.add(f"{name.removesuffix('weight')}{suffix}", part)
    writer.close()
    model.copy_side_files(source, work.out)
    metrics: dict[str, float | int | str] = {
        "layers": found.layers,
        "output_error": round(found.output_error, 6),
    }
    if grid is None or not isinstance(step, Gptq):
        return {**metrics, "sparsity": round(found.sparsity, 6)}
    require_kept(step, kept)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    written = {name.removeprefix(prefix) for name in where}
    outside = [n for n in linears if f"{n.removeprefix(prefix)}.weight" not in written]
    ignore = sorted({*walk.output_heads(skeleton), *left, *outside} - set(extra.values()))
    config = dict(headers.config)
    config["quantization_config"] = pack.config(
        grid, ignore, extra.values(), kept=step.layout == "packed"
    )
    write_config(work.out, config)
    if found.fallbacks:
        reporter.info(f"{found.fallbacks} of {found.layers} layers: plain rounding is better")
    return {
        **metrics,
        "fallbacks": found.fallbacks,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": round(after / before, 6),
    }
