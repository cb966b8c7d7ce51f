"""Round to nearest: small integers with one scale, and maybe a zero-point, per group of inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """What weights are rounded to."""

    bits: int
    group_size: int | None = None
    """Inputs that share a scale; None: all of a row."""
    symmetric: bool = True
    """Whether zero is the middle; else each group has a zero-point. Below 8 bits the scale of a
    symmetric group has the sign that makes its largest weight the least value, of which there is
    one more below zero than above."""
    scale_search: int = 1
    """How many clipping points are tried per group; 1 keeps the largest weight."""
    scale_dtype: torch.dtype = torch.float32
    """What scales are stored in: they are exact in it."""


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: (values - zero) * scale."""

    values: Tensor
    """int8 [out, inputs] in [-2^(bits-1), 2^(bits-1)-1]; not -128 on a symmetric grid."""
    scale: Tensor
    """float32 [out, groups], of either sign."""
    zero: Tensor | None = None
    """int8 [out, groups], the value that stands for zero; None: 0."""

    def dense(self) -> Tensor:
        """Return the float32 matrix [out, inputs]."""
        return dequantize(self.values, self.scale, self.zero)


def quantize(
    weight: Tensor, bits: int, group_size: int | None = None, *, scale_search: int = 1
) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, in] to signed `bits`-bit integers, one scale per `group_size` inputs.

    Returns int8 values [out, in] and float32 scales [out, groups], as `Rounded` has them;
    `group_size` None makes one group of a row. With `scale_search` n > 1, each group tries n
    clipping points down to 80 % of its largest weight, and keeps the one with the smallest squared
    error, where an error counts as much as its weight is large: what is large is rarely in vain.
    An all-zero group gets scale 1, so that it stays zero. Peak memory: four float32 copies of
    `weight`. Raises ValueError if `group_size` doesn't divide the inputs, or if a weight is not
    finite.
    """
    found = round_matrix(weight, Grid(bits, group_size, scale_search=scale_search))
    return found.values, found.scale


def round_matrix(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Rounded:
    """Round `weight` [out, in] to `grid`, as `quantize` does for symmetric ones.

    A group of an asymmetric grid spans its least and its largest weight, and zero, which it holds
    exactly. Errors are multiplied by `importance` [in] too if that is given: the energy of the
    inputs. Peak memory: five float32 copies of `weight`. Raises ValueError as `quantize` does.
    """
    out, inputs = weight.shape
    groups = grouped(weight, grid.group_size)
    if not torch.isfinite(groups).all():
        raise ValueError("it holds NaN or infinite weights")
    weights = None if importance is None else grouped(importance[None], grid.group_size)
    sizes = groups.abs() if grid.scale_search > 1 else torch.empty(0)
    if grid.scale_search > 1 and weights is not None:
        sizes *= weights
    best: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for scale, zero in _candidates(groups, grid):
        if grid.scale_search == 1:
            best = scale, zero
            break
        error = (snapped(groups, scale, zero, grid) - zero).mul_(scale).sub_(groups).square_()
        error = error.mul_(sizes).sum(-1, keepdim=True)
        if best is None:
            best, least = (scale, zero), error
        else:
            better = error < least
            best = scale.where(better, best[0]), zero.where(better, best[1])
            least = torch.minimum(error, least)
    assert best is not None  # at least one is tried
    scale, zero = best
    values = snapped(groups, scale, zero, grid).to(torch.int8).reshape(out, inputs)
    zeros = None if grid.symmetric else zero.squeeze(-1).to(torch.int8)
    return Rounded(values, scale.squeeze(-1), zeros)


def _candidates(groups: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales and zero-points [out, groups, 1], with ever narrower ranges of `groups`."""
    low, high = limits(grid)
    least_scale = torch.finfo(torch.float32).tiny / 0.8  # clipping takes it down to 80 %
    if grid.symmetric and low == -high:
        full = divided(groups.abs().amax(-1, keepdim=True), high)
    elif grid.symmetric:
        full = divided(groups.gather(-1, groups.abs().argmax(-1, keepdim=True)), low)
    else:
        bottom = groups.amin(-1, keepdim=True).clamp_max(0)
        full = divided(groups.amax(-1, keepdim=True).clamp_min(0) - bottom, high - low)
    some = full != 0
    full = full.abs().clamp_min(least_scale).copysign(full).where(some, torch.ones_like(full))
    tries = grid.scale_search
    for step in range(tries):
        share = 1 - 0.2 * step / (tries - 1) if tries > 1 else 1.0
        scale = stored(full * share, grid.scale_dtype)
        if grid.symmetric:
            yield scale, torch.zeros_like(scale)
            continue
        zero = (low - bottom * share / scale).round_().clamp_(low, high)
        yield scale, zero.where(some, torch.zeros_like(zero))


def divided(values: Tensor, by: float) -> Tensor:
    """Return `values` / `by` with the same bits everywhere.

    By a number, CUDA multiplies with its reciprocal, which is rounded; by a tensor it divides.
    """
    return values / torch.tensor(by, dtype=values.dtype, device=values.device)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 scales as `dtype` holds them, no nearer to 0 than its least normal number."""
    if dtype == torch.float32:
        return scale
    return scale.abs().clamp_min(torch.finfo(dtype).tiny).copysign(scale).to(dtype).float()


def limits(grid: Grid) -> tuple[int, int]:
    """Return the least and the largest value of a grid."""
    top = int(2 ** (grid.bits - 1)) - 1
    return (-top if grid.symmetric and grid.bits == 8 else -top - 1), top


def snapped(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Round `groups` / `scale` + `zero` to whole numbers of the grid, as float32."""
    return (groups / scale).round_().add_(zero).clamp_(*limits(grid))


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """Return `weight` [out, in] as float32 [out, groups, size]; ValueError if it doesn't divide."""
    out, inputs = weight.shape
    size = group_size or inputs
    if inputs % size:
        raise ValueError(f"group size {size} does not divide {inputs} inputs")
    return weight.float().reshape(out, inputs // size, size)


def dequantize(values: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Return the float32 weight [out, in] that `values`, `scale` and `zero` [out, groups] mean."""
    out, inputs = values.shape
    groups = values.float().reshape(out, scale.shape[1], inputs // scale.shape[1])
    if zero is not None:
        groups = groups - zero.float().unsqueeze(-1)
    return (groups * scale.float().unsqueeze(-1)).reshape(out, inputs)
