"""A block whose weights come for each of its passes: forward, and once more for the gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

Hold = Callable[[], AbstractContextManager[Any]]


def wrap(module: nn.Module, hold: Hold) -> None:
    """Let `hold` keep the module's weights in place while it runs.

    Where gradients are wanted, only its inputs are kept: it runs again on the way back, so that
    neither its weights nor its activations stay in between (arXiv 1604.06174).
    """
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return _again(own, hold, args, kwargs)
        with hold():
            return own(*args, **kwargs)

    module.forward = forward


def _again(own: Callable[..., Any], hold: Hold, args: Any, kwargs: Any) -> Any:
    leaves, spec = tree.tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    inputs = [leaves[i] for i in places]
    rest = [None if i in places else x for i, x in enumerate(leaves)]
    kind = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")

    def run(tensors: list[Tensor]) -> Any:
        filled = list(rest)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        again, named = tree.tree_unflatten(filled, spec)
        return own(*again, **named)

    shape: list[Any] = []
    # Without an input that wants a gradient the pass would not be recorded: the first block's.
    anchor = torch.zeros((), requires_grad=True)
    found = _Again.apply(run, hold, shape, kind, anchor, *inputs)  # type: ignore[no-untyped-call]
    outs, how = shape
    tensors = iter(found)
    return tree.tree_unflatten([next(tensors) if x is _TENSOR else x for x in outs], how)


_TENSOR = object()


class _Again(torch.autograd.Function):
    """Run without a graph; on the way back run again with one, and go through it."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, hold: Hold, shape: list[Any], kind: str, anchor: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.run, ctx.hold, ctx.kind, ctx.inputs = run, hold, kind, inputs
        ctx.draws = torch.get_rng_state()
        ctx.gpu_draws = torch.cuda.get_rng_state() if kind == "cuda" else None
        ctx.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        with hold():
            out = run(list(inputs))
        outs, how = tree.tree_flatten(out)
        shape[:] = [[_TENSOR if isinstance(x, Tensor) else x for x in outs], how]
        return tuple(x for x in outs if isinstance(x, Tensor))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        devices = [torch.cuda.current_device()] if ctx.gpu_draws is not None else []
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        enabled, dtype = ctx.autocast
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), ctx.hold():
            torch.set_rng_state(ctx.draws)
            if ctx.gpu_draws is not None:
                torch.cuda.set_rng_state(ctx.gpu_draws)
            with torch.autocast(ctx.kind, dtype=dtype, enabled=enabled):
                out = ctx.run(inputs)
            outs = [x for x in tree.tree_flatten(out)[0] if isinstance(x, Tensor)]
            pairs = [
                (x, g)
                for x, g in zip(outs, grads, strict=True)
                if x.requires_grad and g is not None
            ]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        return (None, None, None, None, None, *(x.grad for x in inputs))
