"""Compress block by block on calibration text."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

from bmkit import model
from bmkit.compress import calibrate, layerwise, pack
from bmkit.compress.options.rounding import Gptq
from bmkit.compress.steps.rounding import grid_of, packed, require_kept, tables
from bmkit.compress.work import Metrics, Work, scope, write_config
from bmkit.errors import InputError
from bmkit.nn import walk
from bmkit.nn.allocation import allocate
from bmkit.nn.rounding import Grid, Rounded, round_matrix
from bmkit.place import write_text
from bmkit.plan import read_json


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
            f"{layerwise.TOKENS_AN_INPUT} tokens for each are wanted; raise "
            "data.tokens, or name a longer text"
        )
    bits: dict[str, int] = {}
    if isinstance(step, Gptq) and step.average_bits is not None and grid is not None:
        bits = _chosen_bits(work, step, grid, left)
    where, found = layerwise.walk_blocks(
        source,
        step,
        shared.rows,
        left,
        grid,
        work.folder,
        bits,
        device=shared.device,
        reporter=reporter,
    )
    writer = model.ShardWriter(work.out)
    extra = tables(scoped) if isinstance(step, Gptq) and step.embeddings else {}
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    own: dict[str, int] = {}
    for name, width in bits.items():
        own |= {f"{name}.weight": width, f"{name.removeprefix(prefix)}.weight": width}
    before = after = kept = 0
    for name, tensor in model.tensors(headers):
        if name not in where and name not in extra:
            writer.add(name, tensor)
            continue
        before += 4 * tensor.numel()
        if name in extra:
            try:
                parts = pack.pack(round_matrix(tensor, pack.TABLE), pack.TABLE)
            except ValueError as exc:
                raise InputError(f"{source}: {name}: {exc}") from None
        else:
            parts = layerwise.read(where[name], name)
            if grid is not None and isinstance(step, Gptq):
                mine = replace(grid, bits=own.get(name, grid.bits))
                parts = packed(step, Rounded(**parts), mine)
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
    written = {name.removeprefix(prefix) for name in where}
    outside = [n for n in linears if f"{n.removeprefix(prefix)}.weight" not in written]
    ignore = sorted({*walk.output_heads(skeleton), *left, *outside} - set(extra.values()))
    config = dict(headers.config)
    config["quantization_config"] = pack.config(
        grid, ignore, extra.values(), kept=step.layout == "packed", bits=bits
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


def _chosen_bits(work: Work, step: Gptq, grid: Grid, left: list[str]) -> dict[str, int]:
    """Return the bits of each layer; those of a stopped run, if there are some."""
    note = work.folder / "bits.json"
    if note.is_file():
        return {name: int(bits) for name, bits in read_json(note).items()}
    assert step.average_bits is not None  # the caller has looked
    costs, weights = layerwise.sensitivities(
        work.source,
        work.shared.rows,
        left,
        grid,
        work.folder,
        device=work.shared.device,
        reporter=work.job.reporter,
    )
    found = allocate(costs, weights, step.average_bits)
    work.folder.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(found))
    counts = Counter(found.values())
    said = ", ".join(f"{counts[bits]} of {bits}" for bits in sorted(counts))
    work.job.reporter.info(f"bits of layers: {said}")
    return found
