"""Write quantised layers the way compressed-tensors reads them: format `pack-quantized`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bmkit.nn import two_of_four
from bmkit.nn.rounding import Grid, Rounded

TABLE = Grid(8, scale_dtype=torch.float32)
"""What embeddings are rounded to."""
LAYOUT = "bmkit-rows"
"""A format of a group that other loaders refuse: they know one grid for all layers."""
TWO_OF_FOUR = "bmkit-2of4"
"""The same, of layers some of which are kept without the zeros of 2:4."""


def pack(found: Rounded, grid: Grid) -> dict[str, Tensor]:
    """Return the tensors of one layer [out, in] by their suffix.

    `weight_packed` holds the values of a row one after the other in int32, with 2^(bits-1) added;
    `weight_scale` [out, groups]; `weight_shape` is the shape before packing; `weight_zero_point`
    holds those of asymmetric grids, packed along the rows. The format is that of
    compressed-tensors, which packs here too.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    parts = {
        "weight_packed": pack_to_int32(found.values, grid.bits),
        "weight_scale": found.scale.to(grid.scale_dtype),
        "weight_shape": torch.tensor(found.values.shape),
    }
    if found.zero is not None:
        parts["weight_zero_point"] = pack_to_int32(found.zero, grid.bits, packed_dim=0)
    return parts


def pack_kept(found: Rounded, grid: Grid) -> dict[str, Tensor] | None:
    """Return the tensors of a layer of which two of four weights stay; None for another one.

    `weight_kept` and `weight_places` are those of `nn.two_of_four`, the others as in `pack`.
    """
    values, zero = found.values.cpu(), None if found.zero is None else found.zero.cpu()
    if not two_of_four.fits(values, zero):
        return None
    parts = pack(found, grid)
    del parts["weight_packed"]
    parts["weight_kept"], parts["weight_places"] = two_of_four.pack(values, zero, grid.bits)
    return parts


def integers(found: Rounded, input_scale: float | None = None) -> dict[str, Tensor]:
    """Return the tensors of one layer in the format `int-quantized`, by their suffix.

    `weight` int8 [out, in], `weight_scale` [out, 1], `input_scale` [1] where it is given.
    """
    parts = {"weight": found.values, "weight_scale": found.scale}
    if input_scale is not None:
        parts["input_scale"] = torch.tensor([input_scale])
    return parts


def config_of_integers(ignore: list[str], *, dynamic: bool) -> dict[str, Any]:
    """Return the `quantization_config` of layers whose inputs are rounded to 8 bits too."""
    group = _group(Grid(8), ["Linear"])
    inputs = {**group["weights"], "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    inputs["observer"] = None if dynamic else "minmax"
    group |= {"input_activations": inputs, "format": "int-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def config(
    grid: Grid,
    ignore: list[str],
    tables: Collection[str] = (),
    *,
    kept: bool = False,
    bits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` for `config.json`; `ignore` are the linears left dense.

    `tables` are modules in `TABLE`: embeddings, and a head. If the other layers have another grid,
    transformers, which knows one for all, must refuse this and does; as it does where of some
    layers two of four weights are `kept`.

    `dequantize` makes plain transformers unpack while loading, not at the first forward: it is
    quicker, and `peft` finds the dense weights that it needs. Where all layers have `bits` of their
    own, each is unpacked in the first pass; with zero-points only by bmkit.
    """
    widths = sorted(set((bits or {}).values()), reverse=True) or [grid.bits]
    groups = {}
    for i, width in enumerate(widths):
        named = [name for name, own in (bits or {}).items() if own == width]
        groups[f"group_{i}"] = _group(replace(grid, bits=width), named or ["Linear"])
    if kept:
        groups["group_0"]["format"] = TWO_OF_FOUR
    elif len(widths) > 1 and not grid.symmetric:  # then it takes packed zero-points for plain ones
        groups["group_0"]["format"] = LAYOUT
    if tables and replace(grid, scale_search=1) != TABLE:
        groups[f"group_{len(groups)}"] = {**_group(TABLE, sorted(tables)), "format": LAYOUT}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "dequantize": len(widths) == 1,
    }


def _group(grid: Grid, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    return {"targets": targets, "weights": weights, "format": "pack-quantized"}
