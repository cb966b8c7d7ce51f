"""Weights in the format of AutoGPTQ, GPTQModel and optimum: words of 32 bits along the inputs.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
"""The tensors of a layer."""
V2 = "gptq_v2"
"""A format whose zero-points are stored as they are; those of the older one are less by 1."""


def fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` numbers of `bits` bits each in `words`: int64 [count, columns].

    `words` [words, columns] are int32, each column a stream that begins at the lowest bits; a
    number of 3 bits may lie over the end of a word. Raises ValueError if there are fewer.
    """
    if words.shape[0] * 32 < count * bits:
        raise ValueError(f"{words.shape[0]} words hold no {count} numbers of {bits} bits")
    stream = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count, device=words.device) * bits
    low, shift = first // 32, (first % 32)[:, None]
    high = stream[(low + 1).clamp(max=len(stream) - 1)]  # of no matter where a number ends before
    return (((high << 32) | stream[low]) >> shift) & ((1 << bits) - 1)


def unpack(parts: Mapping[str, Tensor], bits: int, *, v2: bool = False) -> Tensor:
    """Return a layer's weight [outputs, inputs] in the dtype of its scales.

    `parts` holds `qweight` [inputs x bits / 32, outputs], `qzeros` [groups, outputs x bits / 32],
    `scales` [groups, outputs] and, if inputs aren't in order, `g_idx` [inputs], their groups.
    Raises KeyError for a part that lacks, ValueError for shapes that don't fit.
    """
    qweight, qzeros, scales = (parts[name] for name in SUFFIXES[:3])
    groups, outputs = scales.shape
    inputs = qweight.shape[0] * 32 // bits
    group = parts.get("g_idx")
    if group is None:
        group = torch.arange(inputs) // -(-inputs // groups)
    if qweight.shape[1] != outputs or len(group) > inputs or int(group.max()) >= groups:
        raise ValueError("its parts don't fit each other")
    values = fields(qweight, bits, len(group))
    zeros = fields(qzeros.T, bits, outputs).T + (0 if v2 else 1)
    zeros &= (1 << bits) - 1  # 0 is stored as the largest
    index = group.long()
    return ((values - zeros[index]) * scales[index]).T.to(scales.dtype).contiguous()


def bits_of(quantization: Mapping[str, Any]) -> int:
    """Return the bits of a weight, by `quantization_config`; raise ValueError if there are none."""
    bits = quantization.get("bits")
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"GPTQ weights of {bits!r} bits")
    return int(bits)
