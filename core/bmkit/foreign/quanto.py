"""Checkpoints of optimum-quanto: packed weights, and inputs and outputs rounded by stored scales.

The library is an extra, and imported where it is used.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit.artifact import QUANTO
from bmkit.errors import InputError, ResourceError, counted, first_line
from bmkit.foreign import extra
from bmkit.plan import read_json

NONE = "none"


def library() -> Any:
    """Import optimum-quanto, or raise ResourceError naming the extra."""
    return extra.load("optimum.quanto", "quanto", "a checkpoint or step of optimum-quanto")


def require_compiled(weights: Iterable[str]) -> None:
    """Raise ResourceError if code that some of these weights need can't be compiled here.

    quanto compiles what unpacks 2 and 4 bits when it is first used.
    """
    if not {"int2", "int4"} & {kind.removeprefix("q") for kind in weights}:
        return
    library()
    try:
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8), 4)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as exc:
        raise ResourceError(
            f"optimum-quanto compiles its code for 2 and 4 bits, and can't here: {first_line(exc)}",
            hint="install a C++ compiler, or take int8 or float8",
        ) from None


def read_map(path: Path) -> dict[str, dict[str, str]]:
    """Return the map of the checkpoint at `path`; raise InputError if it isn't one."""
    found = read_json(path / QUANTO)
    kinds = {*(library().qtypes), NONE}
    for name, entry in found.items():
        if (
            not isinstance(entry, dict)
            or {entry.get(k) for k in ("weights", "activations")} - kinds
        ):
            raise InputError(
                f"{path / QUANTO}: {name} is quantised in no way that is known: {entry}"
            )
    return found


def rounds_activations(qmap: Mapping[str, Mapping[str, str]]) -> bool:
    """Tell whether what goes through the layers is rounded as well."""
    return any(entry["activations"] != NONE for entry in qmap.values())


def unpacked(
    path: Path, skeleton: nn.Module, tensors: dict[str, Tensor], qmap: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with dense weights, those of quantised layers in float32.

    `skeleton` is the model on any device. Raises InputError for a layer that lacks a part.
    """
    quanto, found = library(), dict(tensors)
    require_compiled(entry["weights"] for entry in qmap.values())
    for name, entry in qmap.items():
        parts = {}
        for key in [k for k in found if k.startswith(f"{name}.")]:
            value = found.pop(key)
            if key.endswith(("_scale", "_shift")):
                value = value.float()
            parts[key.removeprefix(f"{name}.")] = value
        if (bias := parts.get("bias")) is not None:
            found[f"{name}.bias"] = bias
        if entry["weights"] == NONE:
            found[f"{name}.weight"] = parts["weight"]
            continue
        try:
            shape = skeleton.get_parameter(f"{name}.weight").shape
            layer: Any = nn.Linear(shape[1], shape[0], bias=bias is not None)
            layer = quanto.QLinear.from_module(layer, weights=entry["weights"])
            lacking = layer.load_state_dict(parts, strict=False).missing_keys
        except (AttributeError, KeyError, RuntimeError, ValueError, AssertionError) as exc:
            raise InputError(f"{path}: {name} can't be unpacked: {first_line(exc)}") from None
        if lacking:
            raise InputError(f"{path}: {name} lacks {lacking[0]}")
        found[f"{name}.weight"] = layer.weight.dequantize().detach()
    return found


def rounding_outputs(model: nn.Module) -> list[str]:
    """Return the layers whose outputs are rounded: those that calibration found a use for."""
    return [
        name
        for name, module in model.named_modules()
        if (hook := getattr(module, "_quantize_hooks", {}).get("output")) is not None
        and hook.id in module._forward_hooks
    ]


def fill(
    path: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    qmap: Mapping[str, Any],
    rounds_outputs: list[str] | None = None,
) -> None:
    """Put a checkpoint's tensors into `model`, whose parameters may be on the meta device.

    Its layers become quanto's, which round inputs and outputs by the stored scales; outputs only
    of the layers `rounds_outputs`, if it is given. Other numbers are cast to the model's dtype.
    Raises InputError for a checkpoint that isn't the model's.
    """
    require_compiled(entry["weights"] for entry in qmap.values())
    dtype = next(model.parameters()).dtype
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() and not _packed(name) else tensor
        for name, tensor in tensors.items()
    }
    whole = dict(state)
    try:
        library().requantize(model, state, qmap, torch.device("cpu"))
    except (AttributeError, KeyError, RuntimeError, ValueError, AssertionError) as exc:
        raise InputError(f"{path} can't be loaded: {first_line(exc)}") from None
    if rounds_outputs is not None:
        for name in {*rounding_outputs(model)} - {*rounds_outputs}:
            model.get_submodule(name).disable_output_quantization()  # type: ignore[operator]
    model.tie_weights()  # type: ignore[operator]
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if absent := sorted(set(model.state_dict()) - set(whole) - tied):
        raise InputError(
            f"{path}: {counted(len(absent), 'tensor is', 'tensors are')} missing, as {absent[0]}",
            hint="the weights belong to another config.json; fetch the checkpoint again",
        )


def _packed(name: str) -> bool:
    return "._data" in name


def quantise(
    model: nn.Module,
    names: list[str],
    *,
    weights: str,
    activations: str | None,
    optimizer: str | None,
) -> Any:
    """Make the linear layers `names` of a model quanto's, in place; weights aren't frozen yet.

    `weights` and `activations` are `int2`, `int4`, `int8`, `float8`; the optimizer that finds
    scales of groups is `hqq` (Half-Quadratic Quantization) or, if none is named, quanto's own.
    """
    quanto = library()
    require_compiled([weights])
    how = {"hqq": quanto.HqqOptimizer}.get(optimizer or "")
    quanto.quantize(
        model,
        weights=f"q{weights}",
        activations=f"q{activations}" if activations else None,
        optimizer=how() if how else None,
        include=names,
    )
    return quanto


def freeze(model: nn.Module) -> dict[str, dict[str, str]]:
    """Round the weights of quanto's layers in place; return the map to write beside them.

    Raises ResourceError if the library's own code can't be built here.
    """
    quanto = library()
    try:
        quanto.freeze(model)
    except OSError as exc:
        raise ResourceError(f"optimum-quanto can't be used here: {first_line(exc)}") from None
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(weight, quanto.WeightQBytesTensor) and bool((weight._scale == 0).any()):
            empty = weight._scale == 0  # a row of zeros, divided by nothing
            weight._data.view(torch.uint8).masked_fill_(empty, 0)
            weight._scale.masked_fill_(empty, 1)
    found: dict[str, dict[str, str]] = quanto.quantization_map(model)
    return found
