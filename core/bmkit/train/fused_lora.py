"""LoRA and the frozen layer that it is on as one product: fewer passes over its activations.

PEFT multiplies, scales and adds one after another, and in float32 where the layer is bfloat16. Here
the low-rank part is added into the layer's own product, in the layer's dtype, and so are its
gradients; its weights and what they gather stay float32.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bmkit.nn import products
from bmkit.train.dropout import DroppedLinear, draw, dropped, growth

DTYPES = (torch.float32, torch.bfloat16)
"""In float16, gradients of so few values would be lost."""


def fuse(model: nn.Module) -> int:
    """Let plain LoRA on linear layers of `model` be computed in one; return how many layers do.

    They stay PEFT's, with the same weights and names. Where one adapter isn't all that works in a
    layer (several, none, merged ones, per-row ones), PEFT's own forward pass runs.
    """
    count = 0
    layers: list[Any] = [layer for layer in model.modules() if type(layer) is Linear]
    for layer in layers:
        if type(layer.get_base_layer()) is nn.Linear:
            layer.__class__ = FusedLora
            count += 1
    return count


class FusedLora(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer, with a forward pass of one function where it is plain LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output [..., out] of `x` [..., in]."""
        name = None if args or kwargs else self._only(x)
        if name is None:
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        first, second = self.lora_A[name], self.lora_B[name]
        p = first.p if self.training and isinstance(first, DroppedLinear) else 0.0
        base = self.base_layer
        flat: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
            *(x.flatten(0, -2), base.weight, base.bias, first.weight, second.weight),
            *(self.scaling[name], p, draw() if p else 0),
        )
        return flat.view(*x.shape[:-1], flat.shape[-1])

    def _only(self, x: Tensor) -> str | None:
        """Return the one adapter that works here, if it is plain and `x` is what it takes."""
        if self.disable_adapters or self.merged:
            return None
        working = [name for name in self.active_adapters if name in self.lora_A]
        if len(working) != 1 or working[0] in self.lora_variant:
            return None
        name: str = working[0]
        base, first, second = self.base_layer, self.lora_A[name], self.lora_B[name]
        dropout = self.lora_dropout[name]
        plain = (
            type(base) is nn.Linear
            and type(first) in (nn.Linear, DroppedLinear)
            and type(second) is nn.Linear
            and first.bias is None
            and second.bias is None
            and (isinstance(dropout, nn.Identity) or not (self.training and dropout.p))
            and not any(_hooked(part) for part in (base, first, second))
        )
        if not plain or x.dtype not in DTYPES or x.dtype != base.weight.dtype or x.dim() < 2:
            return None
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return None
        if not x.numel() or torch.is_autocast_enabled(x.device.type):
            return None
        return name


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


class _Fused(torch.autograd.Function):
    """x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ of x [n, in], A [rank, in] and B [out, rank].

    Of activations it keeps x alone, and that only for gradients of A and B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor,
        second: Tensor,
        scale: float,
        p: float,
        seed: int,
    ) -> Tensor:
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        learns = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if learns or p else None, weight, first, second)
        a, b = first.to(x.dtype), second.to(x.dtype)
        left = x.masked_fill(dropped(x, p, seed), 0) if p else x
        low = products.linear(left, a)  # [n, rank]
        found = products.linear(x, weight, bias)
        return found.addmm_(low, b.t(), alpha=scale * growth(p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, first, second = ctx.saved_tensors
        needs = ctx.needs_input_grad
        scale = ctx.scale * growth(ctx.p)
        a, b = first.to(grad.dtype), second.to(grad.dtype)
        low = (grad @ b).mul_(scale)  # [n, rank]
        of_x = of_first = of_second = None
        gone = dropped(x, ctx.p, ctx.seed) if ctx.p else None
        left = x if gone is None else x.masked_fill(gone, 0)
        if needs[0]:
            of_x = products.linear(grad, weight.t())
            if gone is None:
                of_x.addmm_(low, a)
            else:
                of_x += (low @ a).masked_fill_(gone, 0)
        if needs[3]:
            of_first = (low.t() @ left).to(first.dtype)
        if needs[4]:
            of_second = (grad.t() @ products.linear(left, a)).mul_(scale).to(second.dtype)
        return of_x, None, None, of_first, of_second, None, None, None
