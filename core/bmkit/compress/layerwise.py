"""Methods that compress matrix by matrix on calibration text, block by block through the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from bmkit import plan
from bmkit.compress.calibrate import Block, Blocks, Seen
from bmkit.compress.options.rounding import Gptq
from bmkit.compress.options.sparse import Magnitude, SparseGpt, Wanda
from bmkit.errors import InputError
from bmkit.model import save_tensors
from bmkit.nn import sparsity
from bmkit.nn.gptq import gptq
from bmkit.nn.hessian import output_error
from bmkit.nn.rounding import Grid, Rounded, round_matrix
from bmkit.nn.zeros import ZEROS
from bmkit.place import write_text
from bmkit.report import Reporter, task

TOKENS_AN_INPUT = 16
"""Fewer calibration tokens for each input of the widest layer are told to be few."""

Layerwise = Gptq | Wanda | SparseGpt
Parts = Mapping[str, Tensor]
"""A compressed matrix: the fields of a `Rounded`, or a dense `weight`."""


@dataclass(frozen=True)
class Figures:
    """What was measured of all matrices of a step."""

    layers: int
    output_error: float
    """Root of the mean square of the layers' relative output errors, on rows held out."""
    fallbacks: int
    """Layers that plain rounding serves better."""
    sparsity: float
    """The share of weights that are zero."""


def dense(parts: Parts) -> Tensor:
    """Return the float32 matrix that `parts` stand for."""
    if "weight" in parts:
        return parts["weight"].float()
    return Rounded(**parts).dense()


def compress(
    step: Layerwise, weight: Tensor, seen: Seen, grid: Grid | None
) -> tuple[dict[str, Tensor], bool]:
    """Compress `weight` [out, inputs] by what went into it; tell whether plain rounding is better.

    Raises ValueError for weights that aren't finite or sizes that don't fit.
    """
    if isinstance(step, Gptq):
        assert grid is not None  # what it rounds to
        zeros = float((weight == 0).float().mean())
        found = gptq(
            weight,
            seen.hessian,
            grid,
            act_order=step.act_order,
            damp=step.damp,
            keep_zeros=zeros > ZEROS,
        )
        plain = round_matrix(weight, grid)
        error, simple = (
            output_error(one.dense() - weight, weight, seen.held_out) for one in (found, plain)
        )
        best = plain if simple < error else found
        parts = {"values": best.values, "scale": best.scale, "zero": best.zero}
        return {k: part for k, part in parts.items() if part is not None}, simple < error
    if not torch.isfinite(weight).all():
        raise ValueError("it holds NaN or infinite weights")
    pattern = sparsity.parse_pattern(step.pattern)
    if isinstance(step, Wanda):
        energy = seen.hessian if seen.hessian.ndim == 1 else seen.hessian.diagonal()
        return {"weight": sparsity.wanda(weight, energy, step.sparsity, pattern)}, False
    pruned = sparsity.sparsegpt(weight, seen.hessian, step.sparsity, pattern, damp=step.damp)
    return {"weight": pruned}, False


def smallest_gone(step: Magnitude, weight: Tensor) -> Tensor:
    """Return `weight` [out, inputs] pruned by magnitude. Raises ValueError as `compress` does."""
    if not torch.isfinite(weight).all():
        raise ValueError("it holds NaN or infinite weights")
    if step.both_ways:
        return sparsity.magnitude_both_ways(weight)
    return sparsity.magnitude(weight, step.sparsity, sparsity.parse_pattern(step.pattern))


WIDTHS = (2, 3, 4, 8)
"""How many bits a layer may have, where that is chosen."""


def walk_blocks(
    source: Path,
    step: Layerwise,
    rows: Tensor,
    left: Sequence[str],
    grid: Grid | None,
    folder: Path,
    bits: Mapping[str, int] | None = None,
    *,
    device: torch.device,
    reporter: Reporter,
) -> tuple[dict[str, Path], Figures]:
    """Compress the linear layers of all blocks of the checkpoint at `source` but `left`.

    Each block is compressed on what comes out of those before it as they are by then. Results lie
    in `folder`, a file a block, from where a stopped run goes on. Returns the file in which the
    result of each stored weight is, and what was measured. `bits` are those of layers that have not
    those of `grid`. Peak memory: see `Blocks`, and a block
    in float32 with the statistics of its layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(source, rows, device=device, both=True)
    where: dict[str, Path] = {}
    notes: list[dict[str, float]] = []
    with task(reporter, step.method, blocks.count, "blocks") as bar:
        for block in blocks.visit():
            chosen = {n: m for n, m in block.linears.items() if n not in left}
            file = folder / f"block-{block.number:05}.safetensors"
            if not file.is_file():
                _write(file, *_block(blocks, step, block, chosen, grid, bits or {}))
            kept = load_file(file)
            notes += plan.read_json(file.with_suffix(".json"))["layers"]
            for name, module in chosen.items():
                stored = blocks.stored(name)
                assert stored is not None  # the file was written
                parts = {k.rpartition(":")[2]: t for k, t in kept.items() if _of(k, stored)}
                module.weight.data = dense(parts).to(module.weight.device)
                where[stored] = file
            bar.advance()
    if not notes:
        raise InputError(f"{source} has no linear layers in its blocks that can be compressed")
    total = sum(n["weights"] for n in notes)
    errors = [n["output_error"] ** 2 for n in notes]
    return where, Figures(
        len(notes),
        (sum(errors) / len(errors)) ** 0.5,
        sum(int(n["fallback"]) for n in notes),
        sum(n["zeros"] for n in notes) / max(total, 1),
    )


def sensitivities(
    source: Path,
    rows: Tensor,
    left: Sequence[str],
    grid: Grid,
    folder: Path,
    *,
    device: torch.device,
    reporter: Reporter,
) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    """Return what the layers of all blocks lose at each number of `WIDTHS` bits, and their weights.

    That is the squared size of the output's error over that of the output, on rows held out, with
    weights rounded plainly. Notes lie in `folder`, a file a block, from where a stopped run goes
    on. Peak memory as of `walk_blocks`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(source, rows, device=device, both=True)
    costs: dict[str, dict[int, float]] = {}
    weights: dict[str, int] = {}
    with task(reporter, "measure what rounding costs", blocks.count, "blocks") as bar:
        for block in blocks.visit():
            chosen = {n: m for n, m in block.linears.items() if n not in left}
            weights |= {name: module.weight.numel() for name, module in chosen.items()}
            note = folder / f"sensitivity-{block.number:05}.json"
            if not note.is_file():
                write_text(note, json.dumps(_sensitivity(blocks, block, chosen, grid)))
            for name, found in plan.read_json(note).items():
                costs[name] = {int(bits): cost for bits, cost in found.items()}
            bar.advance()
    return costs, weights


def _sensitivity(
    blocks: Blocks, block: Block, chosen: Mapping[str, nn.Linear], grid: Grid
) -> dict[str, dict[int, float]]:
    """Return what each layer of a block loses, by bits."""
    seen = blocks.observe(block, list(chosen)) if chosen else {}
    costs: dict[str, dict[int, float]] = {name: {} for name in chosen}
    for name, module in chosen.items():
        weight = module.weight.data
        for bits in WIDTHS:
            try:
                rounded = round_matrix(weight, replace(grid, bits=bits))
            except ValueError as exc:
                raise InputError(f"{blocks.path}: layer {name}: {exc}") from None
            difference = rounded.dense() - weight
            costs[name][bits] = output_error(difference, weight, seen[name].held_out) ** 2
    return costs


def _block(
    blocks: Blocks,
    step: Layerwise,
    block: Block,
    chosen: Mapping[str, nn.Linear],
    grid: Grid | None,
    bits: Mapping[str, int],
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Compress the layers of a block; return their parts by stored name, and what was measured."""
    needs_all = not isinstance(step, Wanda)
    seen = blocks.observe(block, list(chosen), whole=needs_all) if chosen else {}
    found: dict[str, Tensor] = {}
    notes = []
    for name, module in chosen.items():
        stored = blocks.stored(name)
        if stored is None:
            raise InputError(
                f"{blocks.path} has no weight of its own for {name}",
                hint="name it in exclude_modules, to leave it as it is",
            )
        try:
            own = replace(grid, bits=bits[name]) if grid and name in bits else grid
            parts, fallback = compress(step, module.weight.data, seen[name], own)
            if "weight" in parts:
                parts["weight"] = parts["weight"].to(blocks.dtype(stored))
        except ValueError as exc:
            raise InputError(f"{blocks.path}: layer {name}: {exc}") from None
        whole = dense(parts).to(module.weight.device)
        error = output_error(whole - module.weight, module.weight, seen[name].held_out)
        notes.append(
            {
                "output_error": error,
                "fallback": float(fallback),
                "zeros": float((whole == 0).sum()),
                "weights": float(whole.numel()),
            }
        )
        found |= {f"{stored}:{suffix}": part.cpu().contiguous() for suffix, part in parts.items()}
    return found, notes


def _write(file: Path, parts: dict[str, Tensor], notes: list[dict[str, float]]) -> None:
    file.with_suffix(".json").write_text(json.dumps({"layers": notes}), encoding="utf-8")
    save_tensors(file, parts)


def read(file: Path, stored: str) -> dict[str, Tensor]:
    """Return the parts of a stored weight out of its block's file."""
    with safe_open(file, framework="pt") as stream:
        return {
            key.rpartition(":")[2]: stream.get_tensor(key)
            for key in stream.keys()  # noqa: SIM118 - not a dict
            if _of(key, stored)
        }


def _of(key: str, stored: str) -> bool:
    return key.rpartition(":")[0] == stored
