"""GPTQ: round column by column, and let the weights that follow make up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from bmkit.nn.hessian import inverse_factor
from bmkit.nn.rounding import quantize, round_to

BLOCK = 128
"""Columns whose errors are carried to the rest of the matrix together."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None = None,
    *,
    act_order: bool = True,
    damp: float = 0.05,
    scale_search: int = 1,
    keep_zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, inputs] so that its output changes little on inputs with `hessian`.

    `hessian` [inputs, inputs] is the mean of x·xᵀ. Values and scales are those of `quantize`, with
    the same grid. With `act_order`, inputs of the largest energy are rounded first, each group by
    the scale of its weights as they were; else a group's scale follows from its weights as they are
    when it is reached. With `keep_zeros`, weights that are zero stay so. Peak memory: four float32
    copies of `weight`, three of `hessian`. Raises ValueError as `quantize` does. (GPTQ: Accurate
    Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323.)
    """
    values, scale = quantize(weight, bits, group_size, scale_search=scale_search)
    size = group_size or weight.shape[1]
    top = 2 ** (bits - 1) - 1
    energy = hessian.diagonal()
    order = torch.arange(len(energy), device=weight.device)
    if act_order:
        order = torch.argsort(energy, descending=True, stable=True)
    left = weight.float()[:, order]
    zero = left == 0 if keep_zeros else None
    dead = (energy == 0)[order]
    left[:, dead] = 0  # nothing depends on them
    factor = inverse_factor(hessian[order][:, order], damp)
    rounded = torch.empty_like(values)
    for low in range(0, left.shape[1], BLOCK):
        high = min(low + BLOCK, left.shape[1])
        errors = torch.zeros(left.shape[0], high - low, device=left.device)
        for i in range(low, high):
            column = int(order[i])
            group = column // size
            if not act_order and i % size == 0:  # what is behind the block is up to date
                reach = left[:, i : i + size].clone()
                behind = min(i + size, left.shape[1])
                if behind > high:
                    reach[:, high - i :] -= errors[:, : i - low] @ factor[low:i, high:behind]
                _, fresh = quantize(reach, bits, scale_search=scale_search)
                scale[:, group] = fresh[:, 0]
            step = scale[:, group]
            value = round_to(left[:, i], step, top)
            if zero is not None:
                value[zero[:, i]] = 0
            rounded[:, column] = value.to(torch.int8)
            error = (left[:, i] - value * step) / factor[i, i]
            left[:, i:high] -= torch.outer(error, factor[i, i:high])
            errors[:, i - low] = error
        left[:, high:] -= errors @ factor[low:high, high:]
    return rounded, scale
