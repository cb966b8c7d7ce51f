"""The place of the right answer among all, and what is measured by it (LAMA, arXiv 1909.01066)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks(logprobs: Tensor, right: Tensor) -> Tensor:
    """Return the place of `right` [rows] among `logprobs` [rows, answers], from 1: [rows].

    Of equals, those before it in the order of answers go first.
    """
    own = logprobs.gather(1, right[:, None])
    before = torch.arange(logprobs.shape[1], device=logprobs.device) < right[:, None]
    return 1 + (logprobs > own).sum(1) + ((logprobs == own) & before).sum(1)


def measure(places: Sequence[int]) -> dict[str, float]:
    """Return `precision_at_1`, `precision_at_10` and `mean_reciprocal_rank` of places from 1."""
    count = max(len(places), 1)
    found = {
        "precision_at_1": sum(place == 1 for place in places) / count,
        "precision_at_10": sum(place <= 10 for place in places) / count,
        "mean_reciprocal_rank": sum(1 / place for place in places) / count,
    }
    return {name: round(value, 6) for name, value in found.items()}
