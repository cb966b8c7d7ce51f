"""The curvature of a linear layer's output error, and its inverse's Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor

from bmkit.nn import products

STRIP = 384
"""Rows of a symmetric matrix that are computed at once."""


def add_products(total: Tensor, inputs: Tensor) -> None:
    """Add xᵀ·x of `inputs` [tokens, width] to `total` [width, width], on and above the diagonal.

    Below it `total` holds some of the products only: see `mirror`. Two thirds of the time of all.
    """
    for start in range(0, len(total), STRIP):
        strip = inputs[:, start : start + STRIP]
        total[start : start + STRIP, start:] += products.linear(strip.T, inputs[:, start:].T)


def mirror(total: Tensor) -> None:
    """Copy what is above the diagonal of `total` [width, width] to below it."""
    for start in range(STRIP, len(total), STRIP):
        total[start : start + STRIP, :start] = total[:start, start : start + STRIP].T


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Return the upper Cholesky factor U of (H + λI)⁻¹ = UᵀU, for H [inputs, inputs].

    λ is `damp` times the mean of H's diagonal; inputs that are always zero count as ones. It is
    raised tenfold while the matrix can't be inverted. Row i of U, from its diagonal on, tells how
    the weights behind i make up for an error at i when those before it are fixed (GPTQ, arXiv
    2210.17323). Peak memory: three copies of `hessian`. Raises ValueError if it holds NaN.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("its inputs are not finite")
    whole = hessian.float().clone()
    diagonal = whole.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    diagonal += damp * mean
    while True:
        factor, failed = torch.linalg.cholesky_ex(whole)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            found: Tensor = factor
            return found
        damp = max(10 * damp, 1e-4)
        diagonal += damp * mean


def output_error(difference: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Return the size of the output error D·x over that of W·x, by H, the mean of x·xᵀ.

    `difference` and `weight` are [out, inputs]; both sizes are roots of mean squares.
    """
    hessian = hessian.float()
    error = (difference.float() @ hessian * difference).sum()
    energy = (weight.float() @ hessian * weight).sum()
    return float((error / energy.clamp_min(1e-30)).clamp_min(0).sqrt())
