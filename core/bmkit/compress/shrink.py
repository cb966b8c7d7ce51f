"""Cut a model's heads, neurons, hidden width and layers, and write what is left as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bmkit import model, plan
from bmkit.compress.anatomy import Anatomy, Kind
from bmkit.compress.calibrate import Block, Blocks, Seen
from bmkit.compress.layers import renamed
from bmkit.compress.norms import is_raised, norms_in, shares
from bmkit.compress.widths import Widths
from bmkit.errors import InputError
from bmkit.model import save_tensors
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
    energy: Mapping[str, Tensor]
    """float32 [hidden]: by the names of norms' weights, each channel's share of what goes in."""
    raised: Collection[str]
    """The norms that multiply by 1 + weight, as Gemma's do."""

    def norms(self, kept: Tensor) -> dict[str, tuple[float, float]]:
        """Return by what to multiply norms' weights, and what they add to them, for `kept`.

        A norm's mean is over fewer channels then.
        """
        found = {}
        for name, share in self.energy.items():
            ratio = float(share[kept].sum()) * len(share) / len(kept)
            found[name] = (ratio**0.5, float(name in self.raised))
        return found


@dataclass(frozen=True)
class Cut:
    """What of a model stays, and what was made of it."""

    layers: list[int]
    hidden: Tensor | None
    """The channels that stay; None: all."""
    norms: Mapping[str, tuple[float, float]]
    """As `Survey.norms` gives them."""
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
        energy: dict[str, Tensor] = {}
        raised = set()
        with task(reporter, "look at the blocks", blocks.count, "blocks") as bar:
            for block in blocks.visit():
                _watch(block, anatomy, influence, hidden)
                for name, norm in norms_in(blocks.model, anatomy, block.number).items():
                    if is_raised(norm, anatomy.now.hidden, device):
                        raised.add(name)
                    energy[name] = torch.zeros_like(hidden)
                    norm.register_forward_pre_hook(shares(energy[name]))
                bar.advance()
        for name, norm in norms_in(blocks.model, anatomy, None).items():
            energy[name] = torch.zeros_like(hidden)
            for row in blocks.hidden:
                shares(energy[name])(norm, (row,))
            if is_raised(norm, anatomy.now.hidden, device):
                raised.add(name)
        whole = {"influence": influence, "hidden": hidden}
        whole |= {f"{'1+' if n in raised else '0+'}{n}": value for n, value in energy.items()}
        save_tensors(file, {name: value / rows.numel() for name, value in whole.items()})
    found = load_file(file)
    return Survey(
        found["influence"].tolist(),
        found["hidden"],
        {name[2:]: value for name, value in found.items() if "+" in name},
        {name[2:] for name in found if name.startswith("1+")},
    )


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


@dataclass(frozen=True)
class Fitting:
    """How the units of blocks are chosen, and what becomes of the others."""

    target: Widths
    refit: bool
    """Whether what stays makes up for what goes, where that is better on rows held out."""
    damp: float
    chosen: Kept | None = None
    """What stays; None: what carries most."""
    scales: Kept | None = None
    """Without `refit`, what the units that stay are multiplied by."""

    def kinds(self, now: Widths) -> list[Kind]:
        """Return of what there will be less in each block."""
        kinds: tuple[Kind, ...] = ("heads", "ffn")
        return [kind for kind in kinds if getattr(self.target, kind) != getattr(now, kind)]


def fit(
    source: Path,
    anatomy: Anatomy,
    how: Fitting,
    layers: Sequence[int],
    rows: Tensor,
    folder: Path,
    *,
    device: torch.device,
    reporter: Reporter,
) -> tuple[dict[int, Path], float]:
    """Choose the heads and neurons of `layers` that stay, and let them make up for the others.

    Each block is cut on what comes out of those before it as they are by then. Results lie in
    `folder`, a file a block, from where a stopped run goes on. Returns the files, and the root of
    the mean square of relative output errors, on rows held out. Peak memory: see `Blocks`, and six
    float32 copies of the statistics of the widest layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(source, rows, device=device)
    kinds = how.kinds(anatomy.now)
    files: dict[int, Path] = {}
    errors: list[float] = []
    with task(reporter, "cut", len(layers), "blocks") as bar:
        for block in blocks.visit(skip=set(range(blocks.count)) - set(layers)):
            file = files[block.number] = folder / f"block-{block.number:05}.safetensors"
            note = file.with_suffix(".json")
            if not file.is_file():
                parts, own = _fit_block(blocks, block, anatomy, how, kinds)
                note.write_text(json.dumps({"errors": own}), encoding="utf-8")
                save_tensors(file, parts)
            kept = load_file(file)
            for kind in kinds:
                _put(blocks, anatomy, anatomy.inputs(block.number, kind), kept, kind)
            errors += plan.read_json(note)["errors"]
            bar.advance()
    return files, (sum(e * e for e in errors) / max(len(errors), 1)) ** 0.5


def _fit_block(
    blocks: Blocks, block: Block, anatomy: Anatomy, how: Fitting, kinds: Sequence[Kind]
) -> tuple[dict[str, Tensor], list[float]]:
    """Cut a block's inputs of heads, then, behind them, of neurons; return what stays.

    That is the units by their kind, and the weights of the layers that they go into.
    """
    found: dict[str, Tensor] = {}
    errors = []
    for kind in kinds:
        name = anatomy.inputs(block.number, kind)
        stored = blocks.stored(name)
        assert stored is not None  # `require_stored` has looked
        seen = blocks.observe(block, [name])[name]
        weight = _matrix(blocks, anatomy, name)
        chosen = None if how.chosen is None else how.chosen[block.number][kind]
        scale = None if how.scales is None else how.scales[block.number][kind]
        try:
            kept, part, error = _fitted(
                *(weight, seen, anatomy.run(name, kind), getattr(how.target, kind), how),
                chosen=None if chosen is None else chosen.to(weight.device),
                scale=None if scale is None else scale.to(weight.device),
            )
        except ValueError as exc:
            raise InputError(f"{blocks.path}: layer {name}: {exc}") from None
        part = part.T if name in anatomy.conv1d else part
        found |= {kind: kept.cpu(), f"{name}.weight": part.to(blocks.dtype(stored)).cpu()}
        found[f"{name}.weight"] = found[f"{name}.weight"].contiguous()
        errors.append(error)
        _put(blocks, anatomy, name, found, kind)
    return found, errors


def _fitted(
    weight: Tensor,
    seen: Seen,
    run: int,
    keep: int,
    how: Fitting,
    *,
    chosen: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, float]:
    """Return which `keep` units of `run` inputs stay, their columns, and the output error.

    Raises ValueError for weights or inputs that aren't finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("it holds NaN or infinite weights")
    found = []
    for refit in (True, False) if how.refit else (False,):
        kept = chosen
        if kept is None:
            kept = structured.best(weight, seen.hessian, run, keep, refit=refit, damp=how.damp)
        columns = structured.spread(kept, run)
        new = torch.zeros_like(weight)
        new[:, columns] = weight[:, columns]
        if refit:
            new += structured.made_up(weight, seen.hessian, columns, how.damp)
        elif scale is not None and not how.refit:
            new[:, columns] *= scale.repeat_interleave(run)
        found.append((output_error(new - weight, weight, seen.held_out), kept, new[:, columns]))
    error, kept, part = min(found, key=lambda f: f[0])
    return kept, part, error


def _matrix(blocks: Blocks, anatomy: Anatomy, name: str) -> Tensor:
    """Return a layer's weight [out, inputs]."""
    module: Any = blocks.model.get_submodule(name)
    weight: Tensor = module.weight.data
    return weight.T if name in anatomy.conv1d else weight


def _put(
    blocks: Blocks, anatomy: Anatomy, name: str, kept: Mapping[str, Tensor], kind: Kind
) -> None:
    """Let a layer of the model read only what stays of its inputs: other columns are zero."""
    module: Any = blocks.model.get_submodule(name)
    weight, part = module.weight.data, kept[f"{name}.weight"]
    dim = 0 if name in anatomy.conv1d else 1
    columns = structured.spread(kept[kind], anatomy.run(name, kind)).to(weight.device)
    module.weight.data = torch.zeros_like(weight).index_copy_(
        dim, columns, part.to(weight.device, weight.dtype)
    )


def require_stored(source: Path, anatomy: Anatomy, target: Widths) -> dict[str, str]:
    """Return the model's names of the stored tensors.

    Raises InputError if one that is to be cut isn't stored as the model has it.
    """
    whole = empty(source)
    plain = Origin(source, whole).plain
    stored = {id(p) for n, p in whole.named_parameters(remove_duplicate=False) if n in plain}
    for name, parameter in whole.named_parameters():
        cut = anatomy.cut(name, target) != anatomy.shapes[name]
        if cut and id(parameter) not in stored:
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
            if own in cut.norms:
                times, more = cut.norms[own]
                tensor = ((tensor.float() + more) * times - more).to(tensor.dtype)
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
