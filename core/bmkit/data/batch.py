"""Examples of different lengths -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmkit.data.chat import IGNORED, Example


@dataclass(frozen=True)
class Padding:
    """A collator: pad on the right to the longest example of the batch."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each [batch, time]."""
        longest = max(len(e["input_ids"]) for e in examples)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for e in examples:
            gap = longest - len(e["input_ids"])
            rows["input_ids"].append(e["input_ids"] + [self.pad_token_id] * gap)
            rows["attention_mask"].append([1] * len(e["input_ids"]) + [0] * gap)
            rows["labels"].append(e["labels"] + [IGNORED] * gap)
        return {name: torch.tensor(values) for name, values in rows.items()}
