"""How much each word counts for its label, learned (KPT, arXiv 2108.02035)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bmkit.errors import InputError, first_line
from bmkit.model import save_tensors

NAME = "word_weights"


class WordWeights(nn.Module):
    """Logits of a softmax over the words of a label, [labels, words]; at first all count alike."""

    def __init__(self, labels: int, words: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(labels, words))

    def shares(self, there: Tensor) -> Tensor:
        """Return how much each word counts, [labels, words]; `there` says where there is one."""
        return self.logits.detach().cpu().masked_fill(~there, -torch.inf).softmax(-1)

    def save(self, file: Path) -> None:
        """Write the weights, a number a word."""
        save_tensors(file, {NAME: self.logits.detach().clone().contiguous()})


def load(file: Path) -> WordWeights:
    """Read what `save` has written. Raises InputError if it is missing or damaged."""
    try:
        held = load_file(file)[NAME]
        found = WordWeights(*held.shape)
        found.load_state_dict({"logits": held})
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError, TypeError) as exc:
        raise InputError(f"{file} is damaged: {first_line(exc)}") from None
    return found.requires_grad_(False)
