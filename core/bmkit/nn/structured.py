"""Leave inputs of a linear layer out: which carry least, and how the others make up for them.

One-shot importance by activations as in Compact Language Models via Pruning and Knowledge
Distillation (Minitron, arXiv 2407.14679); the loss that is left when the others make up for a part,
as in ZipLM (arXiv 2302.04089); a block's influence as in ShortGPT (arXiv 2403.03853).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROUNDS = 4
"""Times that scores are made anew while parts are left out one after the other."""


def energies(weight: Tensor, hessian: Tensor, run: int) -> Tensor:
    """Return what each part of `run` inputs adds to the output of `weight` [out, inputs]: [parts].

    It is the mean of the squared size of W_p·x_p, by `hessian`, the mean of x·xᵀ. For an FFN's
    down projection (run 1) that is the mean of (act(gate)·up)² times the squared size of a column.
    """
    parts = _parts(weight, run)
    return (parts @ _own(hessian.float(), run) * parts).sum((1, 2))


def losses(weight: Tensor, hessian: Tensor, run: int, damp: float) -> Tensor:
    """Return the output error that is left without each part, when the others make up for it.

    That is tr(W_p·((H + λI)⁻¹_pp)⁻¹·W_pᵀ), λ being `damp` times the mean of H's diagonal.
    """
    inverse = torch.cholesky_inverse(_factor(hessian.float(), damp))
    parts = _parts(weight, run).transpose(1, 2)
    solved = torch.linalg.solve(_own(inverse, run), parts)  # [parts, run, out]
    found: Tensor = (parts * solved).sum((1, 2))
    return found


def best(
    weight: Tensor, hessian: Tensor, run: int, keep: int, *, refit: bool, damp: float
) -> Tensor:
    """Return which `keep` parts of `run` inputs each to keep, ascending: int64 [keep].

    With `refit`, those whose loss the others make up for best go, a part of them at a time, what
    is left counted anew; else those of the least energy. Raises ValueError if H isn't finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("its inputs are not finite")
    count = weight.shape[1] // run
    kept = torch.arange(count, device=weight.device)
    if not refit:
        return energies(weight, hessian, run).topk(keep).indices.sort().values
    for i in range(ROUNDS):
        stay = count - (count - keep) * (i + 1) // ROUNDS
        if stay == len(kept):
            continue
        columns = spread(kept, run)
        left = weight + made_up(weight, hessian, columns, damp) if i else weight
        scores = losses(left[:, columns], hessian[columns][:, columns], run, damp)
        kept = kept[scores.topk(stay).indices].sort().values
    return kept


def spread(parts: Tensor, run: int) -> Tensor:
    """Return the inputs that make up `parts` of `run` inputs each."""
    return (parts[:, None] * run + torch.arange(run, device=parts.device)).flatten()


def made_up(weight: Tensor, hessian: Tensor, kept: Tensor, damp: float) -> Tensor:
    """Return what to add to `weight` [out, inputs] so that inputs `kept` say what all have said.

    The sum D is zero but for columns `kept`: the least squares solution D_K = W_R·H_RK·(H_KK +
    λI)⁻¹ for the columns R that are left out. Peak memory: two copies of `hessian`.
    """
    weight, hessian = weight.float(), hessian.float()
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    found = torch.zeros_like(weight)
    if gone.any() and len(kept):
        wanted = weight[:, gone] @ hessian[gone][:, kept]  # [out, kept]
        factor = _factor(hessian[kept][:, kept], damp)
        found[:, kept] = torch.cholesky_solve(wanted.T, factor).T
    return found


def influence(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cos(h_in, h_out) of each place of hidden states [places, width]."""
    return 1 - functional.cosine_similarity(before.float(), after.float(), dim=-1)


def _parts(weight: Tensor, run: int) -> Tensor:
    """Return the columns of `weight` [out, inputs] in parts of `run`: float32 [parts, out, run]."""
    out = len(weight)
    return weight.float().reshape(out, -1, run).transpose(0, 1)


def _own(matrix: Tensor, run: int) -> Tensor:
    """Return the blocks on the diagonal of `matrix`: [parts, run, run]."""
    return torch.stack([matrix[i : i + run, i : i + run] for i in range(0, len(matrix), run)])


def _factor(hessian: Tensor, damp: float) -> Tensor:
    """Return the lower Cholesky factor of H + λI; λ is raised tenfold while there is none."""
    whole = hessian.clone()
    diagonal = whole.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    diagonal += damp * mean
    while True:
        factor, failed = torch.linalg.cholesky_ex(whole)
        if not failed:
            found: Tensor = factor
            return found
        damp = max(10 * damp, 1e-4)
        diagonal += damp * mean
