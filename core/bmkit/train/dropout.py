"""LoRA's dropout without its activations: the mask is drawn again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

LEVELS = 2**16
"""A probability is a multiple of one part in as many: 16 random bits are drawn for each value."""


def dropped(like: Tensor, p: float, seed: int) -> Tensor:
    """Return which values of a tensor as large as `like` are dropped: bool, each with chance `p`.

    The same seed gives the same ones on the same kind of device. Memory: two bytes a value.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)
    return bits[: like.numel()].view(like.shape) < _level(p) - LEVELS // 2


def growth(p: float) -> float:
    """Return what the values that are left are multiplied by."""
    return LEVELS / (LEVELS - _level(p))


def _level(p: float) -> int:
    return min(max(round(p * LEVELS), 0), LEVELS - 1)


def draw() -> int:
    """Draw a seed from torch's own generator, which a gradient checkpoint sets back."""
    return int(torch.randint(2**62, ()))


class ReplayedDropout(nn.Module):
    """Dropout that keeps a seed for its gradient, instead of a mask as large as its input."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` with a share of `p` put to 0, and the rest scaled up."""
        if not self.training or not self.p:
            return values
        found: Tensor = _Dropped.apply(values, self.p, draw())  # type: ignore[no-untyped-call]
        return found


class DroppedLinear(nn.Linear):
    """A linear layer behind dropout, which keeps its whole input, and not what is left of it.

    That input is kept once where several layers read the same, as queries, keys and values do.
    """

    p = 0.0

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of the weight and what dropout leaves of `input` [..., inputs]."""
        if not self.training or not self.p:
            return super().forward(input)
        given = (input, self.weight, self.bias, self.p, draw())
        found: Tensor = _DroppedProduct.apply(*given)  # type: ignore[no-untyped-call]
        return found


def replace_dropout(model: nn.Module) -> int:
    """Let the LoRA layers of `model` keep no dropped activations; return how many do so now.

    Where PEFT's layer is plain LoRA on a linear layer, its matrix A becomes a DroppedLinear with
    the same weights and name, so that no more is kept than without dropout; in other layers (DoRA
    and its like, convolutions) `nn.Dropout` becomes a ReplayedDropout. Adapters are saved as
    before.
    """
    count = 0
    for layer in _lora_layers(model):
        for name, dropout in list(layer.lora_dropout.items()):
            if type(dropout) is not nn.Dropout or not dropout.p:
                continue
            first: Any = dict(layer.lora_A.items()).get(name)
            plain = type(first) is nn.Linear and name not in getattr(layer, "lora_variant", {})
            if plain:
                first.__class__ = DroppedLinear
                first.p = dropout.p
                layer.lora_dropout[name] = nn.Identity()
            else:
                layer.lora_dropout[name] = ReplayedDropout(dropout.p)
            count += 1
    return count


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict):
            yield module


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return values.masked_fill(dropped(values, p, seed), 0).mul_(growth(p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        there = grad.masked_fill(dropped(grad, ctx.p, ctx.seed), 0)
        return there.mul_(growth(ctx.p)), None, None


class _DroppedProduct(torch.autograd.Function):
    """A product with what dropout leaves; the few outputs are scaled, not the many inputs."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, p: float, seed: int
    ) -> Tensor:
        ctx.p, ctx.seed = p, seed
        ctx.save_for_backward(values, weight)
        left = values.masked_fill(dropped(values, p, seed), 0)
        product = functional.linear(left, weight).mul_(growth(p))
        return product if bias is None else product.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gone = dropped(values, ctx.p, ctx.seed)
        grown = grad * growth(ctx.p)
        of_weight = of_values = None
        if needs[0]:
            of_values = (grown @ weight).masked_fill_(gone, 0)
        if needs[1]:
            left = values.masked_fill(gone, 0).flatten(0, -2)
            of_weight = grown.flatten(0, -2).T @ left
        of_bias = grad.flatten(0, -2).sum(0) if needs[2] else None
        return of_values, of_weight, of_bias, None, None
