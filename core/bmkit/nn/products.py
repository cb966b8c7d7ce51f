"""Products of float32 matrices by oneDNN, where torch takes a slower library.

On the CPU torch multiplies float32 matrices with MKL, which keeps to 256 bits on processors that
aren't Intel's. oneDNN, which torch has as well, uses all 512 that these have: it is twice as quick
from some dozen rows on, forwards and backwards. Both sum in float32; results differ in the last
bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bmkit.nn.attention import attention

LEAST_ROWS = 16
"""Of fewer rows, oneDNN's products aren't quicker,"""
MANY_OUTPUTS = 8192
"""but for a matrix of so many outputs, which comes from memory: a head."""
LEAST_WORK = int(os.environ.get("BMKIT_LEAST_WORK", 2**20))
"""Multiplications below which calling it takes longer than it saves."""


@cache
def can() -> bool:
    """Tell whether oneDNN is there, and the processor has registers of 512 bits."""
    backends: Any = torch.backends
    if not backends.mkldnn.is_available() or not backends.mkl.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · Wᵀ + bias [..., out] of x [..., in] and W [out, in], by oneDNN if it can.

    It can be differentiated once.
    """
    if not _takes(x, weight, bias):
        return functional.linear(x, weight, bias)
    return _product(x, weight, bias)


def quick() -> AbstractContextManager[Any]:
    """Let linear layers go by `linear` while a block runs, and attention by `attention`.

    They do so in the thread that runs it. This holds for any model's own code, where gradients are
    recorded too.
    """
    return _Quick() if can() else nullcontext()


def again() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts for a block that is computed, and computed again on the way back.

    There torch leaves out modes as this one, and what is computed again has to be what it was.
    """
    return nullcontext(), _Quick() if _Quick.entered else nullcontext()


class _Quick(TorchFunctionMode):
    entered = 0

    def __enter__(self) -> Any:
        _Quick.entered += 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        _Quick.entered -= 1
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and not kwargs and _takes(*args):
            return _product(*args)
        if func is torch.addmm and not kwargs and _takes(args[1], args[2].t(), args[0]):
            return _product(args[1], args[2].t(), args[0])  # as GPT-2 writes it
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and any(
        of is not None and of.requires_grad for of in (x, weight, bias)
    ):
        flat: Tensor = _Recorded.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
        return flat.view(
            *x.shape[:-1], len(weight)
        )  # a view out here, that may be changed in place
    return _onednn(x, weight, bias)


class _Recorded(torch.autograd.Function):
    """A product of x [n, in] whose gradients are products by oneDNN. It keeps what torch's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else linear(grad, weight.t())
        of_weight = None if x is None else _outer(grad, x)
        return of_x, of_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ · right [a, b] of `left` [n, a] and `right` [n, b]."""
    if left.shape[1] > right.shape[1]:  # few outputs of many rows are slow
        return linear(right.t(), left.t()).t()
    return linear(left.t(), right.t())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()  # a part of a matrix would take a thousand times as long
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether oneDNN takes a product, and it is worth it."""
    return (
        can()
        and x.numel() > 0
        and (x.numel() >= LEAST_ROWS * x.shape[-1] or weight.shape[0] >= MANY_OUTPUTS)
        and x.numel() * weight.shape[0] >= LEAST_WORK
        and x.dim() > 1
        and _plain(x)
        and _plain(weight)
        and weight.dim() == 2
        and (bias is None or (_plain(bias) and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
    )


def _plain(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.layout is torch.strided
    )
