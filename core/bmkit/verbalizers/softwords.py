"""The soft verbalizer: a row of the head for each label, to be trained (WARP, arXiv 2101.00121)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmkit.prompting.labelwords import LabelWords


class SoftWords(nn.Module):
    """A linear head over labels, in the place of a language model's over its vocabulary."""

    def __init__(self, hidden_size: int, labels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(hidden_size, labels, bias=bias)

    @classmethod
    def of(cls, words: LabelWords, weight: Tensor, bias: Tensor | None = None) -> SoftWords:
        """Begin with the rows of label words in a head's `weight` [vocabulary, hidden_size].

        A label begins with the mean over its words of the mean over their tokens: with one token
        each, scores are those of the language model. `bias` [vocabulary] is the head's, if it has
        one. The rows are copied, on the device and in the dtype of `weight`.
        """
        module = cls(weight.shape[1], len(words.labels), bias=bias is not None)
        module = module.to(weight.device, weight.dtype)
        with torch.no_grad():
            module.head.weight.copy_(_means(words, weight))
            if bias is not None:
                module.head.bias.copy_(_means(words, bias))
        return module

    def forward(self, states: Tensor) -> Tensor:
        """Return scores, [rows, labels], of states that a head would read, [rows, hidden_size]."""
        scores: Tensor = self.head(states)
        return scores


def _means(words: LabelWords, held: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.stack([held[list(word.ids)].float().mean(0) for word in own]).mean(0)
            for own in words.words
        ]
    )
