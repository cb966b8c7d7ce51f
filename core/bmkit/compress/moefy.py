"""MoEfication block by block: divide on the model as it is, then learn who is needed by then."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from bmkit import plan
from bmkit.compress.calibrate import Block, Blocks, held_out
from bmkit.compress.options.experts import Moefy
from bmkit.errors import InputError, RecipeError
from bmkit.model import save_tensors
from bmkit.nn import experts as division
from bmkit.nn.feed_forward import FeedForward, find
from bmkit.report import Reporter, task
from bmkit.runtime.experts import DENSE, Experts, Routed, Router

PROFILED = 4096
"""Tokens that neurons are compared on, at most."""
CHUNK = 2048
USED = 0.25
"""The share of a token's neurons that count as used."""
FLOOR = 1e-6
"""Of a single neuron's share of a token's energy: see `division.target`."""


@dataclass(frozen=True)
class Figures:
    """What was measured, on rows held out."""

    blocks: int
    active: float
    """The share of these blocks' neurons that a token computes."""
    energy: float
    """The share of the neurons' energy that is computed, mean of the blocks."""
    recall: float
    """Of the energy that the best choice of as many experts computes, what the router's does."""


@dataclass(frozen=True)
class Seen:
    """What went through a feed-forward: of all tokens, rows held out last."""

    x: Tensor
    """float32 [tokens, hidden]."""
    important: Tensor
    """bfloat16 [tokens, neurons]: see `division.importance`."""
    weight: Tensor
    """float32 [tokens]: what energy counts there, one over the squared length of the output."""
    fitted: int
    """How many tokens are not held out."""

    @property
    def held_out(self) -> Seen:
        """Return the rows held out; all rows if none are."""
        low = self.fitted if self.fitted < len(self.x) else 0
        return Seen(self.x[low:], self.important[low:], self.weight[low:], 0)

    @property
    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and importance of the rows that are fitted to, some tokens at a time."""
        for low in range(0, self.fitted, CHUNK):
            part = slice(low, min(low + CHUNK, self.fitted))
            yield self.x[part], self.important[part]


@dataclass(frozen=True)
class Shape:
    """How all blocks are divided."""

    size: int
    shared: int

    @staticmethod
    def of(step: Moefy, widths: list[int]) -> Shape:
        """Raise RecipeError if that can't be done with feed-forwards of so many neurons."""
        if step.experts is None:
            size = step.size
        elif len(set(widths)) > 1:
            raise RecipeError(
                f"experts: feed-forwards have {min(widths)} to {max(widths)} neurons",
                hint="give `size` in its place",
            )
        else:
            size = widths[0] // step.experts
        for width in widths:
            if not size or width % size or (step.experts and width % step.experts):
                key, value = ("experts", step.experts) if step.experts else ("size", step.size)
                fits = [n for n in (8, 16, 24, 32, 48, 64, 96, 128) if width % n == 0]
                raise RecipeError(
                    f"{key}: {value} does not divide a feed-forward of {width} neurons",
                    hint=f"size may be {', '.join(map(str, fits))}" if fits else None,
                )
        shared = round(step.shared * min(widths) / size)
        if shared * size >= min(widths):
            raise RecipeError(
                f"shared: {step.shared} of {min(widths)} neurons are all {shared} experts",
                hint="take fewer, or smaller experts",
            )
        return Shape(size, shared)

    def budget(self, step: Moefy, widths: list[int]) -> int:
        """Return how many routed experts all blocks may compute together."""
        whole = round(step.active * sum(widths) / self.size)
        return max(whole - self.shared * len(widths), len(widths))


def walk_blocks(
    source: Path,
    step: Moefy,
    rows: Tensor,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    reporter: Reporter,
) -> tuple[dict[str, tuple[int, Tensor]], Experts, Figures]:
    """Divide all blocks of the checkpoint at `source` into experts.

    First each block is divided on what the dense model makes of `rows`, and it is seen how much
    each further expert is worth there. Then, with as many experts chosen in each block as pay,
    routers are fitted to what comes out of the blocks before, which compute by experts by then.
    Results lie in `folder`, from where a stopped run goes on. Returns for each stored tensor along
    which dimension it is put in what order, the experts, and what was measured.

    Peak memory: see `Blocks`, a block in float32, and of one block its inputs and activations:
    tokens x (4 x width + 2 x neurons + 12 x experts) bytes. Raises InputError for a model without
    feed-forwards that are known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(source, rows, device=device)
    every = {i: find(blocks.stack[i]) for i in range(blocks.count)}
    found = {i: one for i, one in every.items() if one is not None}
    if not found:
        raise InputError(
            f"{source}: no feed-forward is known in the blocks of {type(blocks.model).__name__}",
            hint="dense blocks of linear layers are covered, as of Llama, Qwen, Gemma, OPT, BERT, "
            "GPT-NeoX; not those that have experts already, or gate and up in one matrix",
        )
    widths = [one.width for one in found.values()]
    shape = Shape.of(step, widths)
    moved = dict(_stored(blocks, found))
    orders, curves = _divide(blocks, step, shape, found, folder, seed=seed, reporter=reporter)
    del blocks
    counts = division.spend(curves, shape.budget(step, widths))
    chosen = dict(zip(found, counts, strict=True))
    routers, notes = _route(
        Blocks(source, rows, device=device),
        *(step, shape, found, orders, chosen, folder),
        seed=seed,
        reporter=reporter,
    )
    experts = Experts(
        shape.size,
        shape.shared,
        tuple(chosen.get(i, DENSE) for i in every),
        tuple(routers.get(i) for i in every),
    )
    figures = Figures(
        len(found),
        sum(experts.active(i) or 0 for i in found) / sum(widths),
        sum(n["energy"] for n in notes) / len(notes),
        sum(n["recall"] for n in notes) / len(notes),
    )
    return {name: (dim, orders[i]) for name, (i, dim) in moved.items()}, experts, figures


def _stored(
    blocks: Blocks, found: Mapping[int, FeedForward]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the stored names of tensors that are put in order, their block and dimension."""
    for i, one in found.items():
        for name, dim in (*((n, 0) for n in one.rows), (one.down, 1)):
            whole = f"{blocks.name}.{i}.{name}"
            stored = blocks.stored(whole)
            if stored is None:
                raise InputError(f"{blocks.path} has no weight of its own for {whole}")
            yield stored, (i, dim)
            bias = blocks.origin.plain.get(f"{whole}.bias")
            if bias is not None and not dim:
                yield bias, (i, 0)


def _divide(
    blocks: Blocks,
    step: Moefy,
    shape: Shape,
    found: Mapping[int, FeedForward],
    folder: Path,
    *,
    seed: int,
    reporter: Reporter,
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Return the order of each block's neurons, and what 0, 1, … experts are worth in each."""
    orders, curves = {}, []
    with task(reporter, "divide into experts", len(found), "blocks") as bar:
        for block in blocks.visit():
            if block.number not in found:
                continue
            file = folder / f"order-{block.number:05}.safetensors"
            if not file.is_file():
                one = found[block.number]
                seen = _look(blocks, block, one, go_on=True)
                order = _order(step, shape, block, one, seen, seed)
                curve = _worth(shape, replace(seen, important=seen.important[:, order]))
                _keep(file, {"order": order, "curve": curve})
            parts = load_file(file)
            orders[block.number] = parts["order"]
            curves.append(parts["curve"])
            bar.advance()
    return orders, curves


def _look(blocks: Blocks, block: Block, one: FeedForward, *, go_on: bool = False) -> Seen:
    """Run all rows through a block; with `go_on` for good."""
    up, down = (block.module.get_submodule(name) for name in (one.up, one.down))
    matrix = down.get_parameter("weight")
    held = held_out(len(blocks.hidden)) or {0}
    inputs: dict[int, Tensor] = {}
    important: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    now: list[Tensor] = []
    note = [m.register_forward_pre_hook(lambda _, args: now.append(args[0])) for m in (up, down)]
    try:
        for row, out in blocks.outputs(block, go_on=go_on):
            x, activations = (t.reshape(-1, t.shape[-1]).float() for t in now)
            inputs[row] = x
            important[row] = division.importance(activations, matrix).bfloat16()
            weights[row] = 1 / out.float().square().sum(-1).clamp_min(1e-12)
            now.clear()
    finally:
        for handle in note:
            handle.remove()
    order = sorted(inputs, key=lambda row: (row in held, row))
    fitted = sum(len(inputs[row]) for row in inputs if row not in held)
    x, seen, weight = (torch.cat([t[row] for row in order]) for t in (inputs, important, weights))
    return Seen(x, seen, weight, fitted or len(x))


def _order(
    step: Moefy, shape: Shape, block: Block, one: FeedForward, seen: Seen, seed: int
) -> Tensor:
    """Return an order of a block's neurons in which experts are slices."""
    stride = -(-seen.fitted // PROFILED)
    use = division.used(seen.important[: seen.fitted : stride], USED)
    if step.cluster == "weights":
        rows = block.module.get_submodule(one.rows[0]).get_parameter("weight")
        points = functional.normalize(rows.float(), dim=1)
    elif step.cluster == "coactivation":
        points = functional.normalize(use.T.float(), dim=1)
    else:
        ridge = division.Ridge()
        for x, important in seen.parts:
            energy, whole = division.energies(important, 0, 1)
            ridge.add(x, division.target(energy, whole, FLOOR))
        points = ridge.foreseen()
    return division.divide(points, use.sum(0), shape.shared, shape.size, seed=seed).cpu()


def _worth(shape: Shape, seen: Seen) -> Tensor:
    """Return what 0, 1, … experts are worth, chosen by a linear router fitted to the dense model.

    It is less by the square of what is missing: of the energy that isn't computed, relative to what
    goes on from the block, the mean of all tokens. So no block is left with next to nothing.
    """
    weight, bias = _ridge(shape, seen)
    held = seen.held_out
    energy, whole = division.energies(held.important, shape.shared, shape.size)
    energy, whole = energy * held.weight[:, None], whole * held.weight
    curve = division.captured(energy, whole, held.x @ weight.T + bias)
    missing = (1 - curve).clamp_min(0) * whole.mean()
    return -missing.square().cpu()


def _ridge(shape: Shape, seen: Seen) -> tuple[Tensor, Tensor]:
    ridge = division.Ridge()
    for x, important in seen.parts:
        ridge.add(x, division.target(*division.energies(important, shape.shared, shape.size)))
    return ridge.solve()


def _route(
    blocks: Blocks,
    step: Moefy,
    shape: Shape,
    found: Mapping[int, FeedForward],
    orders: Mapping[int, Tensor],
    chosen: Mapping[int, int],
    folder: Path,
    *,
    seed: int,
    reporter: Reporter,
) -> tuple[dict[int, Router], list[dict[str, Any]]]:
    """Fit the routers, each on what comes out of the blocks before it; return what they capture."""
    routers = {}
    notes = []
    with task(reporter, "fit routers", len(found), "blocks") as bar:
        for block in blocks.visit():
            if block.number not in found:
                continue
            one, count = found[block.number], chosen[block.number]
            up, down = (block.module.get_submodule(name) for name in (one.up, one.down))
            _permute(block, one, orders[block.number])
            file = folder / f"router-{block.number:05}-{count}.safetensors"
            if not file.is_file():
                seen = _look(blocks, block, one)
                router = _fit(step, shape, block, one, seen, count, seed)
                note = _judge(shape, seen, router, count)
                text = json.dumps(note)
                file.with_suffix(".json").write_text(text, encoding="utf-8")
                named = {f.name: getattr(router, f.name) for f in fields(router)}
                _keep(file, {k: t for k, t in named.items() if t is not None})
            router = Router(**load_file(file))
            routers[block.number] = router
            notes.append(plan.read_json(file.with_suffix(".json")))
            Routed(router, count, shape.shared, shape.size).hook(up, down)
            bar.advance()
    return routers, notes


def _permute(block: Block, one: FeedForward, order: Tensor) -> None:
    for name in one.rows:
        for parameter in block.module.get_submodule(name).parameters(recurse=False):
            parameter.data = parameter.data[order.to(parameter.device)]
    down = block.module.get_submodule(one.down).get_parameter("weight")
    down.data = down.data[:, order.to(down.device)]


def _fit(
    step: Moefy, shape: Shape, block: Block, one: FeedForward, seen: Seen, count: int, seed: int
) -> Router:
    if step.router == "similarity":
        rows = block.module.get_submodule(one.rows[0]).get_parameter("weight")
        found = division.similarity(rows, seen.x[: seen.fitted], shape.shared, shape.size)
        return Router(*found)
    weight, bias = _ridge(shape, seen)
    plain = Router(weight, bias)
    if step.router == "linear":
        return plain
    energy, whole = division.energies(seen.important[: seen.fitted], shape.shared, shape.size)
    y = division.target(energy, whole)
    deep = Router(*division.two_layers(weight, bias, seen.x[: seen.fitted], y, seed=seed))
    better = (
        _judge(shape, seen, deep, count)["energy"] >= _judge(shape, seen, plain, count)["energy"]
    )
    return deep if better else plain


def _judge(shape: Shape, seen: Seen, router: Router, count: int) -> dict[str, float]:
    """Return what `count` experts capture on rows held out, and the share of the best choice."""
    held = seen.held_out
    energy, whole = division.energies(held.important, shape.shared, shape.size)
    found, best = (
        float(division.captured(energy, whole, scores)[count])
        for scores in (router.scores(held.x), energy)
    )
    return {"energy": found, "recall": found / max(best, 1e-30)}


def _keep(file: Path, parts: dict[str, Tensor]) -> None:
    save_tensors(file, parts)
