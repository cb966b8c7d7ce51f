"""Which weights of a matrix go: by their size, by what they carry, by what the rest can make up."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from bmkit.nn.hessian import inverse_factor

BLOCK = 128
"""Columns that SparseGPT chooses among, and whose errors are carried on together."""


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (n, m) of `n:m`, n weights kept of each m along the inputs; None: `unstructured`.

    Raises ValueError for anything else.
    """
    if pattern == "unstructured":
        return None
    kept, colon, of = pattern.partition(":")
    if not (colon and kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
        raise ValueError("it takes `unstructured` or n:m, as 2:4")
    return int(kept), int(of)


def kept_of(score: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Return bool [out, inputs]: the weights of the largest `score` that stay.

    Of each row, the share 1 - `sparsity`, or n of each m inputs; of equals, the first. Raises
    ValueError if m doesn't divide the inputs.
    """
    rows, inputs = score.shape
    if pattern is None:
        count = inputs - round(sparsity * inputs)
        groups = score
    else:
        count, size = pattern
        if inputs % size:
            raise ValueError(f"{size} does not divide {inputs} inputs")
        groups = score.reshape(rows, inputs // size, size)
    best = torch.argsort(groups, dim=-1, descending=True, stable=True)[..., :count]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return kept.reshape(rows, inputs)


def magnitude(weight: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Return `weight` [out, inputs] without its smallest entries: of the matrix, or n:m.

    Without a pattern the threshold is the whole matrix's. Peak memory: three copies of `weight`.
    (BMCook's `m4n2_1d` is 2:4; Learning both Weights and Connections, arXiv 1506.02626.)
    """
    score = weight.float().abs()
    if pattern is None:
        kept = kept_of(score.reshape(1, -1), sparsity, None).reshape(weight.shape)
    else:
        kept = kept_of(score, sparsity, pattern)
    return weight * kept


def magnitude_both_ways(weight: Tensor) -> Tensor:
    """Return `weight` [out, inputs] with two of four kept in each row and each column.

    Of each tile of 4 x 4, the largest of all 90 such choices: so W and Wᵀ are both 2:4, where
    BMCook's `m4n2_2d` goes greedily. Raises ValueError if 4 doesn't divide both sides.
    """
    rows, inputs = weight.shape
    if rows % 4 or inputs % 4:
        raise ValueError(f"4 does not divide {rows} x {inputs}")
    lines = [
        torch.tensor([float(i in pair) for i in range(4)]) for pair in combinations(range(4), 2)
    ]
    masks = torch.stack(
        [
            torch.stack((a, b, c, d))
            for a in lines
            for b in lines
            for c in lines
            for d in lines
            if bool(((a + b + c + d) == 2).all())
        ]
    ).to(weight.device)  # [90, 4, 4]
    tiles = weight.float().abs().reshape(rows // 4, 4, inputs // 4, 4).transpose(1, 2)
    sums = tiles.reshape(-1, 16) @ masks.reshape(-1, 16).T  # [tiles, 90]
    chosen = masks[sums.argmax(-1)].reshape(rows // 4, inputs // 4, 4, 4)
    return weight * chosen.transpose(1, 2).reshape(rows, inputs).to(weight.dtype)


def wanda(
    weight: Tensor, energy: Tensor, sparsity: float, pattern: tuple[int, int] | None
) -> Tensor:
    """Return `weight` [out, inputs] without the entries of smallest |w|·‖x‖ in each row.

    `energy` [inputs] is the mean of x². (A Simple and Effective Pruning Approach for
    Large Language Models, arXiv 2306.11695.)
    """
    score = weight.float().abs() * energy.clamp_min(0).sqrt()
    return weight * kept_of(score, sparsity, pattern)


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None,
    *,
    damp: float = 0.01,
) -> Tensor:
    """Return `weight` [out, inputs] pruned column by column, the rest making up for what went.

    Weights of the smallest w² / [H⁻¹]² go: of each row's next m inputs, or the share `sparsity` of
    each block of 128 columns. Peak memory: three float32 copies of `weight` and of `hessian`.
    Raises ValueError if m doesn't divide the inputs or the block. (SparseGPT, arXiv 2301.00774.)
    """
    left = weight.float().clone()
    inputs = left.shape[1]
    size = pattern[1] if pattern else 1
    if inputs % size or BLOCK % size:
        raise ValueError(f"{size} does not divide {inputs} inputs, or {BLOCK}")
    left[:, hessian.diagonal() == 0] = 0
    factor = inverse_factor(hessian, damp)
    diagonal = factor.diagonal()
    for low in range(0, inputs, BLOCK):
        high = min(low + BLOCK, inputs)
        errors = torch.zeros(left.shape[0], high - low, device=left.device)
        kept = torch.ones(left.shape[0], high - low, dtype=torch.bool, device=left.device)
        if pattern is None:
            score = (left[:, low:high] / diagonal[low:high]) ** 2
            every = kept_of(score.reshape(1, -1), sparsity, None)
            kept = every.reshape(score.shape)
        for i in range(low, high):
            if pattern is not None and i % size == 0:
                score = (left[:, i : i + size] / diagonal[i : i + size]) ** 2
                kept[:, i - low : i - low + size] = kept_of(score, sparsity, pattern)
            column = left[:, i].clone()
            gone = ~kept[:, i - low]
            error = torch.where(gone, column, 0) / diagonal[i]
            left[:, i:high] -= torch.outer(error, factor[i, i:high])
            left[gone, i] = 0
            errors[:, i - low] = error
        left[:, high:] -= errors @ factor[low:high, high:]
    return left.to(weight.dtype)
