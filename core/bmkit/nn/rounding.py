"""Round to nearest: symmetric integers with one scale per output channel or per group of inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(
    weight: Tensor, bits: int, group_size: int | None = None, *, scale_search: int = 1
) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, in] to signed `bits`-bit integers, one scale per `group_size` inputs.

    Returns int8 values [out, in] in [-(2^(bits-1)-1), 2^(bits-1)-1] and float32 scales
    [out, groups]; `group_size` None makes one group of a row. With `scale_search` n > 1, each group
    tries n clipping points down to 80 % of its largest weight, and keeps the one with the smallest
    squared error. An all-zero group gets scale 1, so that it stays zero. Peak memory: three float32
    copies of `weight`. Raises ValueError if `group_size` doesn't divide the inputs, or if a weight
    is not finite.
    """
    out, inputs = weight.shape
    size = group_size or inputs
    if inputs % size:
        raise ValueError(f"group size {size} does not divide {inputs} inputs")
    groups = weight.float().reshape(out, inputs // size, size)  # [out, groups, size]
    if not torch.isfinite(groups).all():
        raise ValueError("it holds NaN or infinite weights")
    top = 2 ** (bits - 1) - 1
    largest = groups.abs().amax(-1, keepdim=True)  # [out, groups, 1]
    least_scale = torch.finfo(torch.float32).tiny / 0.8  # clipping takes it down to 80 %
    full = (largest / top).clamp_min(least_scale).where(largest > 0, torch.ones_like(largest))
    scale = full
    if scale_search > 1:
        least = torch.full_like(full, torch.inf)
        for step in range(scale_search):
            tried = full * (1 - 0.2 * step / (scale_search - 1))
            error = (round_to(groups, tried, top) * tried - groups).square().sum(-1, keepdim=True)
            scale = torch.where(error < least, tried, scale)
            least = torch.minimum(error, least)
    values = round_to(groups, scale, top).to(torch.int8)
    return values.reshape(out, inputs), scale.squeeze(-1)


def round_to(groups: Tensor, scale: Tensor, top: int) -> Tensor:
    """Round `groups` / `scale` to whole numbers in [-top, top]."""
    return (groups / scale).round_().clamp_(-top, top)


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight [out, in] that `values` and `scale` [out, groups] stand for."""
    out, inputs = values.shape
    groups = values.float().reshape(out, scale.shape[1], inputs // scale.shape[1])
    return (groups * scale.float().unsqueeze(-1)).reshape(out, inputs)
