"""Networks that work on trained rows while they are trained; only what they make is kept.

What they say is added to the rows (arXiv 2305.03937), and is nothing to begin with, so that rows
begin as their words.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Way = Literal["none", "mlp", "lstm"]
"""Rows as they are; each through a network of two layers; or with those around it, through a
bidirectional LSTM of two layers and that network (P-tuning, arXiv 2103.10385)."""


class LstmEncoder(nn.Module):
    """P-tuning's: the rows are a sequence."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True)
        self.network = _network(2 * hidden, width, 2 * hidden)

    def forward(self, rows: Tensor) -> Tensor:
        """Return what is added to `rows` [rows, width]."""
        states: Tensor = self.lstm(rows)[0]
        added: Tensor = self.network(states)
        return added


def encoder(way: Way, width: int, hidden: int | None, seed: int) -> Any:
    """Return a network over rows of `width`, None for `none`; `hidden` is `width` if not given."""
    if way == "none":
        return None
    inside = hidden or width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if way == "lstm":
            return LstmEncoder(width, max(1, inside // 2))
        return _network(width, width, inside)


def _network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), last)
