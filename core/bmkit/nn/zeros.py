"""Zeros that pruning has left: which matrices have them, and how training leaves them alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ZEROS = 0.1
"""From this share of zeros on a matrix counts as pruned."""


@torch.no_grad()
def is_pruned(weight: Tensor) -> bool:
    """Tell whether a weight is a matrix that was pruned."""
    return weight.ndim > 1 and bool((weight == 0).float().mean() >= ZEROS)


def keep_zeros(parameters: Iterable[nn.Parameter]) -> int:
    """Let no weight that is zero in a pruned matrix learn; return how many matrices are pruned.

    What has no gradient stays zero under AdamW, weight decay included.
    """
    count = 0
    for parameter in parameters:
        if not parameter.requires_grad or not is_pruned(parameter):
            continue
        kept = parameter.detach() != 0

        def mask(grad: Tensor, kept: Tensor = kept) -> Tensor:
            return grad * kept

        parameter.register_hook(mask)  # type: ignore[no-untyped-call]
        count += 1
    return count
