"""Cut a model's heads, neurons, hidden width and layers, and write what is left as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmkit import model, plan
from bmkit.compress.anatomy import Anatomy, Kind
from bmkit.compress.calibrate import Block, Blocks
from bmkit.compress.layers import renamed
from bmkit.compress.widths import Widths
from bmkit.errors import InputError
from bmkit.nn import structured
from bmkit.nn.hessian import output_error
from bmkit.report import Reporter, task
from bmkit.runtime.placed.load import empty
from bmkit.runtime.placed.origin import Origin

Kept = Mapping[int, Mapping[Kind, Tensor]]
"""Of blocks by their numbers, the units that stay, ascending."""


@dataclass(frozen=True)
class Survey:
    """What was seen while text went through the whole model."""

    influence: list[float]
    """1 - cos(h_in, h_out) of each block, the mean over tokens."""
    hidden: Tensor
    """float32 [hidden]: the mean size of each channel where it goes into linear layers."""


@dataclass(frozen=True)
class Cut:
    """What of a model stays, and what was made of it."""

    layers: list[int]
    hidden: Tensor | None
    """The channels that stay; None: all."""
    files: Mapping[int, Path]
    """By block: the units that stay, and the weights that make up for the others."""
    output_error: float
    """Root of the mean square of the layers' relative output errors, on rows held out."""


def survey(
    source: Path,
    anatomy: Anatomy,
    rows: Tensor,
    file: Path,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Survey:
    """Let `rows` go through the model as it is; keep what was seen in `file`.

    Peak memory: see `Blocks`.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        blocks = Blocks(source, rows, device=device)
        hidden = torch.zeros(anatomy.now.hidden)
        influence = torch.zeros(blocks.count)
        with task(reporter, "look at the blocks", blocks.count, "blocks") as bar:
            for block in blocks.visit():
                _watch(block, anatomy, influence, hidden)
                bar.advance()
        influence /= rows.numel()
        scratch = file.with_suffix(".partial")
        save_file({"influence": influence, "hidden": hidden / rows.numel()}, scratch)
        scratch.replace(file)
    found = load_file(file)
    return Survey(found["influence"].tolist(), found["hidden"])


def _watch(block: Block, anatomy: Anatomy, influence: Tensor, hidden: Tensor) -> None:
    """Add to `influence` and `hidden` what the rows do that go through a block next."""

    def change(_: Any, args: tuple[Tensor, ...], out: Any) -> None:
        after = out[0] if isinstance(out, tuple) else out
        influence[block.number] += structured.influence(args[0][0], after[0]).sum().cpu()

    def size(_: Any, args: tuple[Tensor, ...]) -> None:
        hidden.add_(args[0].reshape(-1, args[0].shape[-1]).abs().float().sum(0).cpu())

    block.module.register_forward_hook(change)
    for name, module in block.linears.items():
        sides = anatomy.sides.get(f"{name}.weight", ())
        if any((s.kind, s.dim) == ("hidden", 1) for s in sides):
            module.register_forward_pre_hook(size)


def fit(
    source: Path,
    anatomy: Anatomy,
    target: Widths,
    layers: Sequence[int],
    rows: Tensor,
    folder: Path,
    *,
    refit: bool,
    damp: float,
    chosen: Kept | None = None,
    scales: Kept | None = None,
    device: torch.device,
    reporter: Reporter,
) -> tuple[dict[int, Path], float]:
    """Choose the heads and neurons of `layers` that stay, and let them make up for the others.

    Each block is cut on what comes out of those before it as they are by then. `chosen` says what
    stays; else those do that carry most. Without `refit`, the weights are those of the model, times
    `scales` of the units, if given. Results lie in `folder`, a file a block, from where a stopped
    run goes on. Returns the files and the root mean square of relative output errors, on rows held
    out. Peak memory: see `Blocks`, and six float32 copies of the statistics of the widest layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(source, rows, device=device)
    kinds: list[Kind] = []
    if target.heads != anatomy.now.heads:
        kinds.append("heads")
    if target.ffn != anatomy.now.ffn:
        kinds.append("ffn")
    files: dict[int, Path] = {}
    errors: list[float] = []
    with task(reporter, "cut", len(layers), "blocks") as bar:
        for block in blocks.visit(skip=set(range(blocks.count)) - set(layers)):
            number = block.number
            file = files[number] = folder / f"block-{number:05}.safetensors"
            done = load_file(file) if file.is_file() else {}
            found: dict[str, Tensor] = {}
            own: list[float] = []
            for kind in kinds:
                name = anatomy.inputs(number, kind)
                module: Any = blocks.model.get_submodule(name)
                weight = module.weight.data.T if name in anatomy.conv1d else module.weight.data
                (run,) = {s.run for s in anatomy.sides[f"{name}.weight"] if s.kind == kind}
                if done:
                    kept, part = done[kind].to(device), done[f"{name}.weight"].to(device).float()
                    part = part.T if name in anatomy.conv1d else part
                    columns = structured.spread(kept, run)
                else:
                    seen = blocks.observe(block, [name])[name]
                    try:
                        kept = (
                            structured.best(
                                *(weight, seen.hessian, run, getattr(target, kind)),
                                refit=refit,
                                damp=damp,
                            )
                            if chosen is None
                            else chosen[number][kind].to(device)
                        )
                    except ValueError as exc:
                        raise InputError(f"{source}: layer {name}: {exc}") from None
                    columns = structured.spread(kept, run)
                    part = weight[:, columns]
                    if refit:
                        part = (
                            part
                            + structured.made_up(weight, seen.hessian, columns, damp)[:, columns]
                        )
                    elif scales is not None:
                        part = part * scales[number][kind].to(device).repeat_interleave(run)
                    stored = blocks.stored(name)
                    assert stored is not None  # `require_stored` has looked
                    part = part.to(blocks.dtype(stored))
                    turned = part.T if name in anatomy.conv1d else part
                    found |= {kind: kept.cpu(), f"{name}.weight": turned.contiguous().cpu()}
                    part = part.float()
                new = torch.zeros_like(weight)
                new[:, columns] = part
                if not done:
                    own.append(output_error(new - weight, weight, seen.held_out))
                module.weight.data = new.T.contiguous() if name in anatomy.conv1d else new
            if not done:
                file.with_suffix(".json").write_text(json.dumps({"errors": own}), encoding="utf-8")
                scratch = file.with_suffix(".partial")
                save_file(found, scratch)
                scratch.replace(file)
            errors += plan.read_json(file.with_suffix(".json"))["errors"]
            bar.advance()
    return files, (sum(e * e for e in errors) / max(len(errors), 1)) ** 0.5


def require_stored(source: Path, anatomy: Anatomy, target: Widths) -> dict[str, str]:
    """Return the model's names of the stored tensors.

    Raises InputError if one that is to be cut isn't stored as the model has it.
    """
    plain = Origin(source, empty(source)).plain
    for name in anatomy.shapes:
        if anatomy.cut(name, target) != anatomy.shapes[name] and name not in plain:
            raise InputError(f"{source} has no tensor of its own for {name}, so it can't be cut")
    known = {stored: name for name, stored in plain.items()}
    if target.hidden != anatomy.now.hidden:
        for tensor in plan.read_headers(source).tensors:
            if tensor.name not in known and anatomy.now.hidden in tensor.shape:
                raise InputError(
                    f"{source}: what {tensor.name} is for isn't known: it can't be cut"
                )
    return known


def write(
    source: Path, out: Path, anatomy: Anatomy, target: Widths, known: Mapping[str, str], cut: Cut
) -> int:
    """Write what stays; return how many parameters its blocks have. Peak memory: a shard."""
    writer = model.ShardWriter(out)
    parameters = 0
    some = next(n for n in known.values() if anatomy.layer(n) is not None)
    stored = next(s for s, n in known.items() if n == some)
    stack = stored.removesuffix(some.removeprefix(anatomy.stack))
    for name, tensor in model.tensors(plan.read_headers(source)):
        new = renamed(name, stack, cut.layers)
        if new is None:
            continue
        own = known.get(name)
        layer = anatomy.layer(own) if own is not None else None
        if own is not None:
            file = cut.files.get(layer) if layer is not None else None
            tensor = _cut(anatomy, target, own, tensor, file, cut.hidden)
            if layer is not None:
                parameters += tensor.numel()
        writer.add(new, tensor)
    writer.close()
    model.copy_side_files(source, out)
    return parameters


def _cut(
    anatomy: Anatomy,
    target: Widths,
    name: str,
    tensor: Tensor,
    file: Path | None,
    hidden: Tensor | None,
) -> Tensor:
    """Return what stays of a tensor."""
    kept: dict[str, Tensor] = {} if hidden is None else {"hidden": hidden}
    ready: str | None = None
    if file is not None:
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 - not a dict
                if key in ("heads", "ffn"):
                    kept[key] = stream.get_tensor(key)
                elif key == name:
                    tensor, ready = stream.get_tensor(key), key
    into = 0 if name.rpartition(".")[0] in anatomy.conv1d else 1
    for side in anatomy.sides.get(name, ()):
        if side.kind in kept and not (ready and side.dim == into and side.kind != "hidden"):
            tensor = tensor.index_select(side.dim, side.places(kept[side.kind]))
    assert tuple(tensor.shape) == anatomy.cut(name, target)  # as `require` has promised
    return tensor
