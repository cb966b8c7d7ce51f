"""From scores of tokens at masks to labels: the manual verbalizer and its kin.

Scores are logits or log-probabilities; as everything here ends in a softmax over label words or
labels, it comes to the same. The steps: `word_scores` or `combine`, `normalise`, perhaps
`calibration.apply`, `aggregate`; `label_logprobs` is all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bmkit.prompting.labelwords import LabelWords
from bmkit.verbalizers import calibration

Handler = Literal["first", "mean", "max"]

FLOOR = -34.54
"""What -inf counts as, next to the likeliest word: a probability of 1e-15."""


@dataclass(frozen=True)
class Columns:
    """Where the tokens of label words stand among the scores at a mask."""

    token_ids: Tensor
    """[columns]: the tokens of all label words, sorted."""
    places: Tensor
    """[labels, words, tokens]: columns, 0 where there is no token."""
    tokens: Tensor
    """[labels, words, tokens]: whether there is a token."""

    @classmethod
    def of(cls, words: LabelWords, device: Any = None) -> Columns:
        """Return the columns of label words, as tensors on `device`."""
        ids = words.token_ids
        column = {token: at for at, token in enumerate(ids)}
        most = max(len(own) for own in words.words)
        longest = max(len(word.ids) for word in words.flat)
        places = torch.zeros(len(words.labels), most, longest, dtype=torch.long)
        tokens = torch.zeros(places.shape, dtype=torch.bool)
        for i, own in enumerate(words.words):
            for j, word in enumerate(own):
                places[i, j, : len(word.ids)] = torch.tensor([column[t] for t in word.ids])
                tokens[i, j, : len(word.ids)] = True
        return cls(torch.tensor(ids, device=device), places.to(device), tokens.to(device))

    @property
    def words(self) -> Tensor:
        """Return whether there is a word, [labels, words]."""
        return self.tokens.any(-1)

    def pick(self, scores: Tensor) -> Tensor:
        """Return the columns of label words, [..., columns], of scores [..., vocabulary]."""
        return scores.index_select(-1, self.token_ids)

    def arrange(self, scores: Tensor) -> Tensor:
        """Return scores of all words one after the other, [rows, n], as [rows, labels, words]."""
        arranged = scores.new_full((len(scores), *self.words.shape), -torch.inf)
        arranged[:, self.words] = scores
        return arranged


def word_scores(scores: Tensor, columns: Columns, handler: Handler = "first") -> Tensor:
    """Return the scores of words, [rows, labels, words], of scores at a mask, [rows, columns].

    A word of several tokens has the score of its first one, or their mean or highest. Where a label
    has fewer words than another, the score is -inf.
    """
    return _handled(scores[:, columns.places], columns.tokens, handler)


def combine(token_logprobs: Tensor, lengths: Tensor, how: Literal["sum", "mean"] = "sum") -> Tensor:
    """Return the log-likelihoods of words, [rows, words], of those of their tokens.

    `token_logprobs` [rows, words, tokens] holds for each token its log-probability behind those
    before it; what stands behind the `lengths` [words] of words is passed over. `mean` takes the
    mean over tokens, so that long words lose nothing.
    """
    there = torch.arange(token_logprobs.shape[-1], device=lengths.device) < lengths.unsqueeze(-1)
    total = token_logprobs.masked_fill(~there, 0.0).sum(-1)
    return total if how == "sum" else total / lengths


def normalise(scores: Tensor, words: Tensor) -> Tensor:
    """Return log-probabilities over all words of all labels, [rows, labels, words].

    `words` [labels, words] says where there is one; elsewhere it is -inf. A word of score -inf
    counts as one of a probability of 1e-15, so that the others of its label still count.
    """
    lost = scores.isneginf() & words
    scores = scores.masked_fill(~words, -torch.inf)
    top = scores.amax((-2, -1), keepdim=True)
    least = torch.where(top.isneginf(), 0.0, top) + FLOOR
    filled = torch.where(lost, least, scores)
    return filled.flatten(1).log_softmax(-1).view_as(filled)


def aggregate(
    logprobs: Tensor,
    words: Tensor,
    over: Literal["logarithms", "probabilities"] = "logarithms",
    weights: Tensor | None = None,
) -> Tensor:
    """Return log-probabilities of labels, [rows, labels], of those of words.

    A label has the mean of its words: of their logarithms, as OpenPrompt has it, or of their
    probabilities. `weights` [labels, words] (KPT's, arXiv 2108.02035), logits of a softmax over the
    words of a label, weigh it.
    """
    share = torch.zeros(words.shape, device=words.device) if weights is None else weights
    share = share.masked_fill(~words, -torch.inf).log_softmax(-1)
    if over == "probabilities":
        scores = (logprobs + share).logsumexp(-1)
    else:
        scores = (logprobs.masked_fill(~words, 0.0) * share.exp()).sum(-1)
    return scores.log_softmax(-1)


def label_logprobs(
    scores: Tensor,
    columns: Columns,
    handler: Handler = "first",
    *,
    prior: Tensor | None = None,
    over: Literal["logarithms", "probabilities"] = "logarithms",
    weights: Tensor | None = None,
) -> Tensor:
    """Return log-probabilities of labels, [rows, labels], of scores at a mask, [rows, columns].

    `prior` [labels, words] are log-probabilities of words to divide by (see `calibration`).
    """
    words = normalise(word_scores(scores, columns, handler), columns.words)
    if prior is not None:
        words = calibration.apply(words, prior)
    return aggregate(words, columns.words, over, weights)


def rule_logprobs(scores: Tensor, columns: Columns, handler: Handler = "first") -> Tensor:
    """Return log-probabilities of labels, [rows, labels], of scores [rows, masks, columns].

    A label has one word at each mask, resolved `in_order`, and is as likely as all of them
    together (PTR, arXiv 2105.11259).
    """
    return rule_scores(scores, columns, handler).sum(1).log_softmax(-1)


def rule_scores(scores: Tensor, columns: Columns, handler: Handler = "first") -> Tensor:
    """Return the scores of each label's word at each mask, [rows, masks, labels]."""
    each = [
        _handled(scores[:, mask][:, columns.places[:, mask]], columns.tokens[:, mask], handler)
        for mask in range(columns.places.shape[1])
    ]
    return torch.stack(each, 1)


def label_scores(scores: Tensor, words: Tensor) -> Tensor:
    """Return the mean scores of the words of each label, [rows, labels]: for several labels a row.

    Labels don't compete here. Taken of log-probabilities less their prior, a score says by how
    much a row makes a label's words likelier, so that a sigmoid of it is above a half if it does.
    """
    there = words.to(scores.dtype)
    total = scores.masked_fill(~words, 0.0).sum(-1)
    return total / there.sum(-1)


def chosen(scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Return which labels a row has, [rows, labels]: where the sigmoid of a score is above it."""
    return scores.sigmoid() > threshold


def probabilities(logprobs: Tensor, labels: Sequence[str]) -> list[dict[str, float]]:
    """Return the probabilities of a row's labels, by name."""
    return [dict(zip(labels, row, strict=True)) for row in logprobs.exp().tolist()]


def _handled(found: Tensor, tokens: Tensor, handler: Handler) -> Tensor:
    """Make one score of those of a word's tokens, the last axis; -inf where there is no word."""
    if found.dtype in (torch.float16, torch.bfloat16):
        found = found.float()
    if handler == "first":
        one = found[..., 0]
    elif handler == "max":
        one = found.masked_fill(~tokens, -torch.inf).amax(-1)
    else:
        one = found.masked_fill(~tokens, 0.0).sum(-1) / tokens.sum(-1).clamp_min(1)
    return one.masked_fill(~tokens.any(-1), -torch.inf)
