"""Round by other libraries, each in its own format. They are extras, imported where they work."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bmkit import model, plan
from bmkit.artifact import QUANTO
from bmkit.compress import calibrate
from bmkit.compress.options.foreign import OptimumGptq, Quanto
from bmkit.compress.steps.rounding import group_size
from bmkit.compress.work import Metrics, Scope, Work, scope, write_config
from bmkit.errors import InputError, RecipeError, ResourceError, first_line, machine_refusal
from bmkit.foreign import extra
from bmkit.foreign import quanto as quantised
from bmkit.nn import walk
from bmkit.place import write_text
from bmkit.report import task

WORD = 32
"""Outputs of a layer that GPTQModel packs at once."""


def quanto(work: Work, step: Quanto) -> Metrics:
    """Round weights, and activations by scales found on text, by optimum-quanto."""
    quantised.library()
    shared, found = work.shared, scope(work.source, step.exclude_modules)
    names = [name for name in found.linears if name not in found.left]
    rows = list(shared.rows) if step.activations else []
    whole = _opened(work)
    _require_numbers(work, whole, names)
    made = quantised.quantise(
        whole,
        names,
        weights=step.weights,
        activations=step.activations,
        optimizer=step.optimizer,
    )
    if rows:
        with (
            torch.inference_mode(),
            made.Calibration(),
            task(work.job.reporter, "find scales", len(rows), "rows") as bar,
        ):
            for row in rows:
                whole(**calibrate.inputs(whole.config, row.to(shared.device)), use_cache=False)
                bar.advance()
    before, error = 0, [0.0, 0.0]
    with task(work.job.reporter, f"quantize to {step.weights}", len(names), "layers") as bar:
        for name in names:
            layer: Any = whole.get_submodule(name)
            weight = layer.weight.detach()
            before += 4 * weight.numel()
            quantised.freeze(layer)
            rounded = layer.weight.dequantize()
            error[0] += float((rounded - weight).float().square().sum())
            error[1] += float(weight.float().square().sum())
            if not torch.isfinite(rounded).all():
                raise InputError(f"{work.source}: layer {name} can't be rounded to {step.weights}")
            bar.advance()
    qmap = quantised.freeze(whole)
    after = _write(work, whole.state_dict(), _tied(whole), names)
    write_text(work.out / QUANTO, json.dumps(qmap, indent=1) + "\n")
    _configure(
        work,
        {
            "quant_method": "quanto",
            "weights": step.weights,
            # a word that transformers refuses: it would load this with random weights
            "activations": step.activations or quantised.NONE,
            "rounds_outputs": quantised.rounding_outputs(whole) if rows else [],
            "modules_to_not_convert": _left(found),
        },
    )
    return _figures(len(names), before, after, error)


def optimum_gptq(work: Work, step: OptimumGptq) -> Metrics:
    """Round weights by optimum's GPTQ, one block after the other."""
    with contextlib.redirect_stdout(sys.stderr):  # it greets
        extra.load("gptqmodel", "gptq", "`optimum_gptq`")
        optimum = extra.load("optimum.gptq", "gptq", "`optimum_gptq`")
    shared, found = work.shared, scope(work.source, step.exclude_modules)
    stack, _ = walk.stack(found.skeleton)
    inside = [n for n in found.linears if n.startswith(f"{stack}.")]
    names = [n for n in inside if n not in found.left]
    group = group_size(step.group_size, [found.linears[n].in_features for n in names])
    if odd := [n for n in names if found.linears[n].out_features % WORD]:
        raise RecipeError(
            f"{len(odd)} layers, as {odd[0]}, have {found.linears[odd[0]].out_features} outputs: "
            f"GPTQModel packs multiples of {WORD}",
            hint="name them in exclude_modules",
        )
    rows = shared.rows
    whole = _opened(work)
    _require_numbers(work, whole, names)
    weights = {n: whole.get_submodule(n).weight.detach().float().cpu() for n in names}
    quantizer = optimum.GPTQQuantizer(
        step.bits,
        dataset=[{"input_ids": r[None], "attention_mask": torch.ones_like(r[None])} for r in rows],
        group_size=-1 if group is None else group,
        damp_percent=step.damp,
        desc_act=step.act_order,
        act_group_aware=group is not None and not step.act_order,
        sym=step.symmetric,
        model_seqlen=rows.shape[1],
        block_name_to_quantize=stack,
        modules_in_block_to_quantize=_of_a_block(stack, names) if found.left else None,
    )
    folder = work.folder / "optimum"
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            whole = quantizer.quantize_model(whole, tokenizer=None)
            quantizer.dataset = None  # or it is written into the config
            whole.config.quantization_config = quantizer.to_dict()
            quantizer.save(whole, str(folder))
        except (ValueError, RuntimeError, NotImplementedError) as exc:
            if said := machine_refusal(exc):
                raise ResourceError(f"optimum_gptq: {said}") from None
            raise InputError(f"{work.source}: optimum's GPTQ says: {first_line(exc)}") from None
    del whole
    stored = dict(model.tensors(plan.read_headers(folder)))
    after = _write(work, stored, set(), names)
    shutil.rmtree(folder)
    _configure(work, quantizer.to_dict())
    error = [0.0, 0.0]
    dense = model.load_model(work.out, device=torch.device("cpu"), dtype="float32")
    for name, weight in weights.items():
        error[0] += float((dense.get_submodule(name).weight - weight).square().sum())
        error[1] += float(weight.square().sum())
    before = 4 * sum(weight.numel() for weight in weights.values())
    return _figures(len(names), before, after, error)


def _opened(work: Work) -> Any:
    """Load the whole model, for what its config says that it is."""
    shared = work.shared
    shared.forget()
    config = model.load_config(work.source)
    return model.load_model(
        work.source, device=shared.device, dtype=shared.recipe.dtype, config=config
    )


def _require_numbers(work: Work, whole: nn.Module, names: list[str]) -> None:
    for name in names:
        if not torch.isfinite(whole.get_parameter(f"{name}.weight")).all():
            raise InputError(f"{work.source}: layer {name} holds NaN or infinite weights")


def _of_a_block(stack: str, names: list[str]) -> list[list[str]]:
    """Return what is quantised of each block; raise RecipeError if that isn't the same."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block, _, inner = name.removeprefix(f"{stack}.").partition(".")
        blocks.setdefault(block, []).append(inner)
    first = next(iter(blocks.values()))
    if any(inner != first for inner in blocks.values()):
        raise RecipeError(
            "exclude_modules: optimum_gptq leaves the same layers out of every block",
            hint="name them without the number of a block",
        )
    return [[inner] for inner in first]


def _tied(whole: Any) -> set[str]:
    head, inputs = whole.get_output_embeddings(), whole.get_input_embeddings()
    shares = head is not None and inputs is not None and head.weight is inputs.weight
    return set(getattr(whole, "_tied_weights_keys", None) or ()) if shares else set()


def _write(work: Work, state: Mapping[str, Tensor], tied: set[str], names: list[str]) -> int:
    """Write tensors, floats in the stored dtype; return the bytes of the layers `names`."""
    stored = model.stored_dtype(model.load_config(work.source))
    layers = {*names}
    writer, after = model.ShardWriter(work.out), 0
    for name, tensor in state.items():
        if name in tied:
            continue
        if tensor.is_floating_point() and "._data" not in name:
            half = name.endswith(".scales") and stored.itemsize > 2
            tensor = tensor.to(torch.float16 if half else stored)
        owner = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
        if owner in layers and not name.endswith(".bias"):
            after += tensor.numel() * tensor.element_size()
        writer.add(name, tensor.detach().cpu())
    writer.close()
    model.copy_side_files(work.source, work.out)
    return after


def _configure(work: Work, quantization: dict[str, Any]) -> None:
    config = dict(plan.read_json(work.source / "config.json"))
    config["quantization_config"] = quantization
    write_config(work.out, config)


def _left(found: Scope) -> list[str]:
    return sorted({*walk.output_heads(found.skeleton), *found.left})


def _figures(layers: int, before: int, after: int, error: list[float]) -> Metrics:
    return {
        "layers": layers,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": round(after / before, 6),
        "weight_error": round((error[0] / max(error[1], 1e-30)) ** 0.5, 6),
    }
