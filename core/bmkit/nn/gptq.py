"""GPTQ: round column by column, and let the weights that follow make up for each error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bmkit.nn.hessian import inverse_factor
from bmkit.nn.rounding import Grid, Rounded, round_matrix, snapped

BLOCK = 128
"""Columns whose errors are carried to the rest of the matrix together."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    act_order: bool = True,
    damp: float = 0.05,
    keep_zeros: bool = False,
) -> Rounded:
    """Round `weight` [out, inputs] so that its output changes little on inputs with `hessian`.

    `hessian` [inputs, inputs] is the mean of x·xᵀ. With `act_order`, inputs of the largest energy
    are rounded first, each group by the scale of its weights as they were; else a group's scale
    follows from its weights as they are when it is reached. Clipping points are judged by squared
    errors times |w| and the inputs' energy. With `keep_zeros`, weights that are zero stay so. Peak
    memory: five float32 copies of `weight`, three of `hessian`. Raises ValueError as `quantize`
    does. (GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv
    2210.17323.)
    """
    energy = hessian.diagonal()
    found = round_matrix(weight, grid, energy)
    values, scale, zero = found.values, found.scale, found.zero
    size = grid.group_size or weight.shape[1]
    order = torch.arange(len(energy), device=weight.device)
    if act_order:
        order = torch.argsort(energy, descending=True, stable=True)
    left = weight.float()[:, order]
    gone = left == 0 if keep_zeros else None
    dead = (energy == 0)[order]
    left[:, dead] = 0  # nothing depends on them
    factor = inverse_factor(hessian[order][:, order], damp)
    rounded = torch.empty_like(values)
    places = order.tolist()
    nothing = torch.zeros_like(scale[:, 0])
    for low in range(0, left.shape[1], BLOCK):
        high = min(low + BLOCK, left.shape[1])
        errors = torch.zeros(left.shape[0], high - low, device=left.device)
        for i in range(low, high):
            column = places[i]
            group = column // size
            if not act_order and i % size == 0:  # what is behind the block is up to date
                reach = left[:, i : i + size].clone()
                behind = min(i + size, left.shape[1])
                if behind > high:
                    reach[:, high - i :] -= errors[:, : i - low] @ factor[low:i, high:behind]
                fresh = round_matrix(reach, replace(grid, group_size=None), energy[i : i + size])
                scale[:, group] = fresh.scale[:, 0]
                if zero is not None and fresh.zero is not None:
                    zero[:, group] = fresh.zero[:, 0]
            step = scale[:, group]
            middle = nothing if zero is None else zero[:, group].float()
            value = snapped(left[:, i], step, middle, grid)
            if gone is not None:
                value = torch.where(gone[:, i], middle, value)
            rounded[:, column] = value.to(torch.int8)
            error = (left[:, i] - (value - middle) * step) / factor[i, i]
            left[:, i:high] -= torch.outer(error, factor[i, i:high])
            errors[:, i - low] = error
        left[:, high:] -= errors @ factor[low:high, high:]
    return Rounded(rounded, scale, zero)
