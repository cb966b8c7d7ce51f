"""Attention on the CPU whose gradients are computed in float32 where torch's bfloat16 is slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

LONGEST = 256
"""Tokens up to which torch's gradients of bfloat16 attention take about twice as long."""
FLASH = 1
"""What `_fused_sdp_choice` calls flash attention."""
KNOWN = hasattr(torch, "_fused_sdp_choice") and all(
    hasattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{half}")
    for half in ("", "_backward")
)
"""Whether this torch has what is used here."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `torch.nn.functional.scaled_dot_product_attention` does, to the same bits.

    Gradients of short bfloat16 rows are more exact than torch's, and sooner there. It can be
    differentiated once.
    """
    how: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    twice = is_causal and attn_mask is not None  # torch refuses it
    short = not (enable_gqa or twice) and _takes(query, key, value, attn_mask, dropout_p)
    if (
        not short
        or torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, **how) != FLASH
    ):
        how["enable_gqa"] = enable_gqa
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, **how
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = hidden.masked_fill_(~attn_mask, float("-inf"))
    given = (query, key, value, attn_mask, is_causal, scale)
    found: Tensor = _Attention.apply(*given)  # type: ignore[no-untyped-call]
    return found


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    three = (query, key, value)
    return (
        dropout == 0
        and torch.is_grad_enabled()
        and all(
            type(x) in (Tensor, nn.Parameter)
            and x.dtype is torch.bfloat16
            and x.device.type == "cpu"
            and x.dim() == 4
            and 0 < x.shape[-2] <= LONGEST
            for x in three
        )
        and any(x.requires_grad for x in three)
        and (mask is None or (type(mask) is Tensor and not mask.requires_grad))
        and KNOWN
        and not torch.is_autocast_enabled("cpu")
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        ctx.causal, ctx.scale = causal, scale
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found, logsumexp = run(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, mask, found, logsumexp)
        attended: Tensor = found
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, found, logsumexp = ctx.saved_tensors
        wide = [x.float() for x in (grad, query, key, value, found)]
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = run(
            *(*wide, logsumexp, 0.0, ctx.causal),
            attn_mask=None if mask is None else mask.float(),
            scale=ctx.scale,
        )
        return (*[g.to(query.dtype) for g in grads], None, None, None)
