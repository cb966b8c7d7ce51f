"""Write quantised layers the way compressed-tensors reads them: format `pack-quantized`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(values: Tensor, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the tensors of one layer by their suffix, from int8 `values` [out, in] and `scale`.

    `weight_packed` holds 32 / bits values in each int32, `weight_shape` the shape before packing.
    The format is that of compressed-tensors, which packs here too.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "weight_packed": pack_to_int32(values, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(values.shape),
    }


def config(bits: int, group_size: int | None, ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` for `config.json`; `ignore` are the linears left dense.

    `dequantize` makes plain transformers unpack while loading, not at the first forward: it is
    quicker, and `peft` finds the dense weights that it needs.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
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
