"""Write quantised layers the way compressed-tensors reads them: format `pack-quantized`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmkit.nn.rounding import Grid, Rounded


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


def config(grid: Grid, ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` for `config.json`; `ignore` are the linears left dense.

    `dequantize` makes plain transformers unpack while loading, not at the first forward: it is
    quicker, and `peft` finds the dense weights that it needs.
    """
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
        },
        "ignore": ignore,
        "dequantize": True,
    }
