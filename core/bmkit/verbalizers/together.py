"""What several prompts say of the same rows, as one (PET, arXiv 2001.07676)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Over = Literal["logarithms", "probabilities"]


def mean(
    logprobs: Tensor, weights: Sequence[float], over: Over, *, several: bool = False
) -> Tensor:
    """Return log-probabilities of labels, [rows, labels], of those of members, [members, …].

    The weighted mean of probabilities, or of logarithms, normalised over labels. With `several`
    a label is had or not: that of its probability, or of the logarithm of its odds. Weights that
    are all 0 count as equal.
    """
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
    each = logprobs.double()
    if over == "probabilities":
        return torch.einsum("m,mrl->rl", shares, each.exp()).log().float()
    if several:
        each = each - torch.log(-torch.expm1(each.clamp_max(-1e-12)))
    found = torch.einsum("m,mrl->rl", shares, each.clamp_min(-1e4))
    if several:
        return torch.nn.functional.logsigmoid(found).float()
    return found.log_softmax(-1).float()


def chosen(logprobs: Tensor, *, several: bool = False) -> list[tuple[int, ...]]:
    """Return the likeliest label of each row, [rows, labels]; with `several` those above a half."""
    if not several:
        return [(int(at),) for at in logprobs.argmax(-1)]
    return [tuple(row.nonzero()[:, 0].tolist()) for row in logprobs > math.log(0.5)]
