"""Packed weights, of bmkit's own formats and of other libraries', as dense tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bmkit.errors import InputError, first_line
from bmkit.foreign import gptq, quanto
from bmkit.nn import two_of_four
from bmkit.nn.rounding import dequantize
from bmkit.plan import Headers


def is_ours(quantization: Any) -> bool:
    """Tell whether packed integers are ones that transformers can't unpack.

    That is a format of bmkit's own, or several grids: it unpacks all layers by the first.
    """
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    groups = list((values.get("config_groups") or {}).values())
    several = len(groups) > 1 and all((g.get("weights") or {}).get("type") == "int" for g in groups)
    return several or any(str(g.get("format")).startswith("bmkit") for g in groups)


Way = Literal["plain", "stock", "here", "modules"]
"""How weights become a model's: as they lie; unpacked by transformers; unpacked here; or in modules
of another library, which round what goes through them too."""


def way(path: Path, quantization: Any) -> Way:
    """Tell how a checkpoint with this `quantization_config` is loaded.

    Raises InputError for one that can't be, ResourceError if a library is wanted for it.
    """
    if not quantization:
        return "plain"
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    method = values.get("quant_method")
    method = getattr(method, "value", method)
    if method == "quanto":
        return "modules" if quanto.rounds_activations(quanto.read_map(path)) else "here"
    if method == "gptq":
        return "here"
    if method != "compressed-tensors":
        raise InputError(
            f"{path} is quantised as {method}",
            hint="bmkit reads compressed-tensors, GGUF, GPTQ and optimum-quanto",
        )
    return "here" if is_ours(quantization) else "stock"


def unpacked(headers: Headers, found: dict[str, Tensor], skeleton: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint's tensors `found`, packed ones dense, each by its own grid.

    `skeleton` is its model, on any device. Raises InputError for a module that lacks a part.
    """
    values = headers.config.get("quantization_config") or {}
    method = values.get("quant_method")
    if method == "quanto":
        return quanto.unpacked(headers.path, skeleton, found, quanto.read_map(headers.path))
    return _of_gptq(headers, found) if method == "gptq" else _of_integers(headers, found)


def _of_gptq(headers: Headers, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    values, found = headers.config["quantization_config"], dict(tensors)
    v2 = values.get("checkpoint_format", values.get("format")) == gptq.V2
    for name in [n.removesuffix(".qweight") for n in found if n.endswith(".qweight")]:
        parts = {}
        for suffix in gptq.SUFFIXES:
            if (part := found.pop(f"{name}.{suffix}", None)) is not None:
                parts[suffix] = part
        try:
            weight = gptq.unpack(parts, gptq.bits_of(values), v2=v2)
        except (KeyError, ValueError, IndexError, RuntimeError) as exc:
            why = f"it lacks {exc}" if isinstance(exc, KeyError) else first_line(exc)
            raise InputError(f"{headers.path}: {name} can't be unpacked: {why}") from None
        found[f"{name}.weight"] = weight
    return found


def _of_integers(headers: Headers, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    found = dict(tensors)
    ends = (".weight_packed", ".weight_kept")
    for name in [n.rpartition("_")[0] for n in found if n.endswith(ends)]:
        parts = {}
        for suffix in ("packed", "kept", "places", "scale", "shape", "zero_point"):
            if (part := found.pop(f"{name}_{suffix}", None)) is not None:
                parts[f"weight_{suffix}"] = part
        try:
            shape, groups = parts["weight_shape"].tolist(), parts["weight_scale"].shape[-1]
            if "weight_kept" in parts:
                found[name] = _of_kept(parts, shape, groups, headers.bits_of(name))
                continue
            grid = QuantizationArgs(
                num_bits=headers.bits_of(name),
                symmetric="weight_zero_point" not in parts,
                strategy="channel" if groups == 1 else "group",
                group_size=None if groups == 1 else shape[1] // groups,
            )
            scheme = QuantizationScheme(targets=["Linear"], weights=grid)
            found[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        except (KeyError, ValueError, RuntimeError, IndexError) as exc:
            raise InputError(
                f"{headers.path}: {name} can't be unpacked: {first_line(exc)}"
            ) from None
    return found


def _of_kept(parts: dict[str, Tensor], shape: list[int], groups: int, bits: int) -> Tensor:
    """Return a dense matrix in float32 of which two of four values are kept."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rows, inputs = shape
    zero = None
    if (packed := parts.get("weight_zero_point")) is not None:
        flat = packed.T.reshape(-1).view(groups, -1)  # strides that it can view
        zero = unpack_from_int32(flat, bits, torch.Size([groups, rows])).T.contiguous()
    values = two_of_four.unpack(parts["weight_kept"], parts["weight_places"], zero, bits, inputs)
    return dequantize(values, parts["weight_scale"].reshape(rows, groups), zero)
