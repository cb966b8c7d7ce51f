"""Cross-entropy behind a linear head, a few rows of logits at a time."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bmkit.nn import products

ROWS = 256
"""Rows of logits at a time; with fewer, reading the head takes longer than its products."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    weights: Tensor | None = None,
    own: tuple[Tensor, Tensor] | None = None,
    rows: int = ROWS,
) -> Tensor:
    """Return the summed cross-entropy of `targets` [n] under the head's logits, a float32 scalar.

    Each counts by its part of `weights` [n]. Logits are scale · (`hidden` [n, width] · `weight`ᵀ
    [vocabulary, width] + `bias`), then capped as softcap · tanh(logits / softcap); with `own`,
    tokens [k] and rows [k, width], these rows stand in the place of those of `weight`. They are
    made `rows` rows at a time, and the gradients in the same pass, so that none are kept: peak
    memory is two float32 copies of such a part, and a gradient for each argument that needs one
    (that of a trained weight in float32). It can be differentiated once. On CUDA, Liger's kernel
    does it where `liger_kernel` is installed (Liger Kernel, arXiv 2410.10989), without `weights`
    and `own`.
    """
    plain = weights is None and own is None
    if plain and hidden.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        return _by_liger(hidden, weight, targets, bias, scale, softcap)
    tokens, trained = own or (None, None)
    how = (weights, tokens, scale, softcap, rows, torch.is_grad_enabled())
    given = (hidden, weight, bias, trained, targets, *how)
    loss: Tensor = _Chunks.apply(*given)  # type: ignore[no-untyped-call]
    return loss


def _by_liger(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    liger = importlib.import_module("liger_kernel.transformers")
    if scale != 1.0:
        hidden, bias = hidden * scale, bias if bias is None else bias * scale
    made = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=softcap)
    loss: Tensor = made(weight, hidden, targets, bias).float()
    return loss


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        tokens: Tensor | None,
        scale: float,
        softcap: float | None,
        rows: int,
        wanted: bool,
    ) -> Tensor:
        given = (hidden, weight, bias, trained)
        needs = [need and wanted for need in ctx.needs_input_grad[:4]]
        grads = [
            torch.zeros_like(of, dtype=torch.float32) if need and of is not None else None
            for of, need in zip(given, needs, strict=True)
        ]
        total = hidden.new_zeros((), dtype=torch.float32)
        parts = max(math.ceil(len(hidden) / rows), 1)
        for i in range(parts):  # all of about the same size
            part = slice(i * len(hidden) // parts, (i + 1) * len(hidden) // parts)
            logits = products.linear(hidden[part], weight, bias).float()  # [rows, vocabulary]
            if tokens is not None and trained is not None:
                said = products.linear(hidden[part].to(trained.dtype), trained)
                logits[:, tokens] = (said if bias is None else said + bias[tokens]).float()
            if scale != 1.0:
                logits = logits * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            chosen = targets[part, None]
            said = logits.log_softmax(-1)
            right = said.gather(1, chosen).squeeze(1)
            total -= right.sum() if weights is None else right @ weights[part].float()
            if not any(needs):
                continue
            error = said.exp_()  # the loss's gradient of the logits
            error.scatter_add_(1, chosen, error.new_full(chosen.shape, -1.0))
            if softcap is not None:
                error *= 1 - (logits / softcap).square()
            if scale != 1.0:
                error *= scale
            if weights is not None:
                error *= weights[part, None]
            if grads[2] is not None:
                grads[2] += error.sum(0)
            if tokens is not None and trained is not None:
                apart = error[:, tokens].to(trained.dtype)  # [rows, k]
                error[:, tokens] = 0
                if grads[0] is not None:
                    grads[0][part] = apart @ trained
                if grads[3] is not None:
                    grads[3] += apart.T @ hidden[part].to(apart.dtype)
            error = error.to(weight.dtype)
            if grads[0] is not None:
                grads[0][part] += products.linear(error, weight.t())
            if grads[1] is not None:
                grads[1] += products.linear(error.t(), hidden[part].t())
        kept = [
            of.to(like.dtype) if of is not None and like is not None else None
            for of, like in zip(grads, given, strict=True)
        ]
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * factor.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, *[None] * 7)
