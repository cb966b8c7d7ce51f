"""Train on rounded weights: forward what the export writes, the gradient straight through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

Round = Callable[[Tensor], Tensor]
"""What an export makes of a weight [out, in]: the float32 matrix that is read back."""


class _Through(torch.autograd.Function):
    """Forward `rounded`; backward as if it were `exact` (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, bit for bit, whose gradient goes to `exact` of the same shape.

    `exact + (rounded - exact).detach()` would not do: its sum is rounded once more. (Estimating or
    Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432.)
    """
    found: Tensor = _Through.apply(exact, rounded)  # type: ignore[no-untyped-call]
    return found


def round_tokens(x: Tensor, bits: int = 8) -> Tensor:
    """Round activations [..., width] to signed integers, each token by its own largest entry.

    The gradient goes straight through. A token of zeros stays.
    """
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        largest = x.abs().amax(-1, keepdim=True)
        scale = (largest / top).where(largest > 0, torch.ones_like(largest))
        rounded = (x / scale).round_().clamp_(-top, top) * scale
    return straight_through(x, rounded)


@contextmanager
def rounded_weights(
    layers: Iterable[nn.Linear], round_weight: Round, *, activations: int | None = None
) -> Iterator[None]:
    """Let `layers` compute with `round_weight` of their weights while the block runs.

    Weights are rounded again when they have changed, as by a step of the optimizer, and their
    parameters keep names and values. With `activations`, what goes into the layers is rounded to so
    many bits, token by token. Memory: a float32 copy of the layers' weights.
    """
    chosen = list(layers)
    kept: dict[nn.Linear, tuple[int, Tensor]] = {}
    # Fused optimizers change parameters without counting it as a new version.
    hook = register_optimizer_step_post_hook(lambda *_: kept.clear())
    for layer in chosen:
        layer.__dict__["forward"] = _forward(layer, round_weight, activations, kept)
    try:
        yield
    finally:
        hook.remove()
        for layer in chosen:
            del layer.__dict__["forward"]


def _forward(
    layer: nn.Linear,
    round_weight: Round,
    activations: int | None,
    kept: dict[nn.Linear, tuple[int, Tensor]],
) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight = layer.weight
        version, rounded = kept.get(layer, (None, weight))
        if version != weight._version:
            with torch.no_grad():
                rounded = round_weight(weight).to(weight.dtype)
            kept[layer] = weight._version, rounded
        if activations is not None:
            x = round_tokens(x, activations)
        return functional.linear(x, straight_through(weight, rounded), layer.bias)

    return forward
