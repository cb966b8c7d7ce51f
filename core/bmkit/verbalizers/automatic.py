"""Label words found by their likelihood ratio (PETAL, arXiv 2010.13641)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.prompting.labelwords import LabelWords, Word

TINY = 1e-15


@dataclass(frozen=True)
class Found:
    """The best tokens of each label, the best one first, and their scores."""

    token_ids: list[list[int]]
    scores: list[list[float]]

    def words(self, tokenizer: Any, labels: Sequence[str]) -> LabelWords:
        """Return what was found as label words."""
        words = tuple(
            tuple(Word(tokenizer.decode([token]), (token,)) for token in own)
            for own in self.token_ids
        )
        return LabelWords(tuple(labels), words)


def likelihood_ratios(
    logprobs: Tensor, labels: Tensor, classes: int, *, balanced: bool = True
) -> Tensor:
    """Return how well each token tells each label from the others, [labels, vocabulary].

    `logprobs` [rows, vocabulary] are those at the mask, `labels` [rows] numbers. The score is the
    sum over a label's rows of log(q / (1 - q)), less that over the other rows. `balanced` weighs
    it as if there were as many rows of the label as others. Probabilities count as 1e-15 at least.
    """
    odds = (logprobs.exp() + TINY).log() - (1 - logprobs.exp() + TINY).log()
    own = torch.nn.functional.one_hot(labels, classes).T.to(odds.dtype)  # [labels, rows]
    others = 1 - own
    weight = own * (others.sum(1) / own.sum(1))[:, None] if balanced else own
    return (weight - others) @ odds


def search(
    logprobs: Tensor,
    labels: Tensor,
    classes: int,
    *,
    words_per_label: int = 1,
    num_candidates: int = 1000,
    balanced: bool = True,
    allowed: Tensor | None = None,
    exclusive: bool = True,
) -> Found:
    """Return the `words_per_label` tokens of the highest likelihood ratio for each label.

    Only the `num_candidates` tokens that are likeliest over a label's rows are looked at (0: all),
    and of them those that are `allowed` [vocabulary]. With `exclusive` a token goes to the label
    that it tells best. Rows of several templates may follow one another. Of equals the lower
    token comes first. Raises InputError if a label has no rows, or there is but one.
    """
    rows = torch.bincount(labels, minlength=classes)
    if classes < 2 or not bool(rows.all()):
        raise InputError(
            "label words are searched by telling labels apart, and not all of them have rows",
            hint="each label takes a row at least, and there are two labels at least",
        )
    scores = likelihood_ratios(logprobs.double(), labels, classes, balanced=balanced)
    keep = torch.ones_like(scores, dtype=torch.bool)
    if allowed is not None:
        keep &= allowed.to(keep.device)
    if num_candidates > 0:
        keep &= _likely(logprobs.double(), labels, keep, num_candidates)
    if exclusive:
        keep &= scores.argmax(0) == torch.arange(classes, device=scores.device)[:, None]
    scores = scores.masked_fill(~keep, -torch.inf)
    best, order = scores.sort(descending=True, stable=True)
    counts = keep.sum(1).tolist()
    if min(counts) < 1:
        raise InputError(
            "label words: no candidate tells a label from the others",
            hint="raise num_candidates, or use more rows",
        )
    taken = [min(words_per_label, count) for count in counts]
    return Found(
        [row[:n].tolist() for row, n in zip(order, taken, strict=True)],
        [row[:n].tolist() for row, n in zip(best, taken, strict=True)],
    )


def whole_words(tokenizer: Any, size: int | None = None) -> Tensor:
    """Return which tokens begin a word and have two letters and nothing else, [vocabulary].

    `size` is the model's vocabulary, where it isn't the tokenizer's.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    mark = next((m for m in "Ġ▁" if _begins(vocabulary, m)), "")
    allowed = torch.zeros(size or max(vocabulary.values()) + 1, dtype=torch.bool)
    for token, number in vocabulary.items():
        bare = token[len(mark) :]
        word = token.startswith(mark) and len(bare) > 1 and bare.isalpha()
        if word and number not in special and number < len(allowed):
            allowed[number] = True
    return allowed


def _begins(vocabulary: Iterable[str], mark: str) -> bool:
    """Tell whether `mark` is how tokens begin a word: one of fifty does, at least."""
    tokens = list(vocabulary)
    return 50 * sum(token.startswith(mark) for token in tokens) >= len(tokens)


def _likely(logprobs: Tensor, labels: Tensor, keep: Tensor, count: int) -> Tensor:
    """Return the likeliest tokens over the rows of each label, [labels, vocabulary]."""
    found = torch.zeros_like(keep)
    floor = logprobs.exp().add(TINY).log()
    for label in range(len(keep)):
        total = floor[labels == label].sum(0).masked_fill(~keep[label], -torch.inf)
        found[label, total.argsort(descending=True, stable=True)[:count]] = True
    return found
