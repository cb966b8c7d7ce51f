"""Labels as rules: a label is said by words at several masks, of which others share some.

PTR (arXiv 2105.11259): `person:parent` is a `person`, the `parent` of a `person`. The words that
labels have at one mask, each once, are its sub-labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.prompting.labelwords import LabelWords


@dataclass(frozen=True)
class SubLabels:
    """Which labels have the same word at a mask."""

    numbers: Tensor
    """[masks, labels]: the number of each label's word among those of a mask."""
    firsts: tuple[tuple[int, ...], ...]
    """By mask and sub-label: the first label that has it."""

    @classmethod
    def of(cls, words: LabelWords) -> SubLabels:
        """Return those of words that were resolved `in_order`."""
        numbers: list[list[int]] = []
        firsts: list[tuple[int, ...]] = []
        for own in zip(*words.words, strict=True):
            known: dict[tuple[int, ...], int] = {}
            first: list[int] = []
            for label, word in enumerate(own):
                if word.ids not in known:
                    known[word.ids] = len(known)
                    first.append(label)
            numbers.append([known[word.ids] for word in own])
            firsts.append(tuple(first))
        return cls(torch.tensor(numbers), tuple(firsts))

    def loss(self, scores: Tensor, right: Tensor) -> Tensor:
        """Return the summed loss of sub-labels, a number: the mean over masks of cross-entropies.

        `scores` [rows, masks, labels] are those of labels' words, `right` [rows] labels. A mask at
        which all labels have one word costs nothing.
        """
        each = [
            functional.cross_entropy(
                scores[:, mask, list(first)], self.numbers[mask][right], reduction="sum"
            )
            for mask, first in enumerate(self.firsts)
        ]
        return torch.stack(each).mean()
