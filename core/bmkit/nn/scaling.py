"""Scales between two layers, chosen so that what is rounded afterwards loses less."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmkit.nn.rounding import Grid, round_matrix


def activation_aware(
    weights: Sequence[Tensor], hessian: Tensor, grid: Grid, *, tries: int = 20
) -> tuple[Tensor, float]:
    """Choose factors [inputs] for `weights` [out, inputs] that make rounding to `grid` cost least.

    Weights are multiplied by them and the inputs divided. They are powers of the inputs' size, the
    root of the diagonal of `hessian` [inputs, inputs], the mean of x·xᵀ; `tries` exponents below 1
    are tried, and the one kept whose outputs, all matrices' together, change least. Returns the
    factors, of geometric mean 1, and what is left of the squared error: 1 where nothing is better
    than no scaling. Raises ValueError for weights that aren't finite. (AWQ: Activation-aware
    Weight Quantization for LLM Compression and Acceleration, arXiv 2306.00978.)
    """
    size = hessian.diagonal().clamp_min(0).sqrt()
    best = torch.ones_like(size)
    first = least = _error(weights, hessian, best, grid)
    for i in range(1, tries):
        factors = _balanced(size ** (i / tries))
        error = _error(weights, hessian, factors, grid)
        if error < least:
            best, least = factors, error
    return best, least / max(first, 1e-30)


def _error(weights: Sequence[Tensor], hessian: Tensor, factors: Tensor, grid: Grid) -> float:
    total = 0.0
    for weight in weights:
        difference = round_matrix(weight * factors, grid).dense() / factors - weight
        total += float((difference @ hessian * difference).sum())
    return total


def smooth(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return factors [inputs] that move the inputs' range into `weights` [out, inputs].

    `largest` [inputs] are the inputs' largest sizes; factor j is largest_j^alpha over the weights'
    largest size at input j, to the power of 1 - alpha. (SmoothQuant: Accurate and Efficient
    Post-Training Quantization for Large Language Models, arXiv 2211.10438.)
    """
    own = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    some = (largest > 0) & (own > 0)
    factors = largest.clamp_min(1e-12) ** alpha / own.clamp_min(1e-12) ** (1 - alpha)
    return _balanced(torch.where(some, factors, torch.ones_like(factors)))


def _balanced(factors: Tensor) -> Tensor:
    """Return `factors` over their geometric mean, at least 1e-3 and at most 1e3."""
    factors = factors.clamp_min(1e-12)
    return (factors / factors.log().mean().exp()).clamp(1e-3, 1e3)
