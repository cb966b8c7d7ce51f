"""Refinement of label words that a knowledge base has listed (KPT, arXiv 2108.02035)."""

from __future__ import annotations

import torch
from torch import Tensor

from bmkit.prompting.labelwords import LabelWords


def frequent(words: LabelWords, prior: Tensor, candidate_frac: float = 0.5) -> LabelWords:
    """Leave out words that have a token among the rarest `candidate_frac` of the vocabulary.

    `prior` [vocabulary] is how likely each token is at the mask, over rows without labels
    (contextualised prior; logits or log-probabilities). A label keeps its likeliest word at
    least.
    """
    rare = torch.zeros(len(prior), dtype=torch.bool)
    rare[prior.argsort(stable=True)[: int(candidate_frac * len(prior))].cpu()] = True
    likely = prior.tolist()
    best = [_likeliest([word.ids for word in own], likely) for own in words.words]
    return words.keep(
        lambda label, word: (
            word == best[label] or not any(rare[t] for t in words.words[label][word].ids)
        )
    )


def _likeliest(words: list[tuple[int, ...]], likely: list[float]) -> int:
    """Return the place of the word whose rarest token is the likeliest."""
    return max(range(len(words)), key=lambda at: min(likely[token] for token in words[at]))


def relevance(logprobs: Tensor, there: Tensor) -> Tensor:
    """Return how much more a word goes with its own label than with others, [labels, words].

    `logprobs` [rows, labels, words] are those of words at the mask, over rows without labels;
    `there` [labels, words] says where there is one. A word's probabilities over these rows are a
    vector, and the first word of a label stands for it: the relevance is the cosine with its own
    label over the mean cosine with the others, the paper's R(v). One label has nothing to compare:
    it is 1. Where there is no word it is 0.
    """
    profiles = logprobs.movedim(0, -1).exp()  # [labels, words, rows]
    profiles = torch.nn.functional.normalize(profiles.double(), dim=-1)
    cosines = torch.einsum("lwr,kr->lwk", profiles, profiles[:, 0])  # [labels, words, labels]
    labels = len(there)
    own = cosines.diagonal(dim1=0, dim2=2).T  # [labels, words]
    if labels == 1:
        return there.to(logprobs.dtype)
    others = (cosines.sum(-1) - own) / (labels - 1)
    return (own / others.clamp_min(1e-12)).masked_fill(~there, 0.0).to(logprobs.dtype)


def relevant(words: LabelWords, logprobs: Tensor, there: Tensor, least: float = 1.0) -> LabelWords:
    """Leave out words whose `relevance` is below `least`; the first of a label stays."""
    scores = relevance(logprobs, there).tolist()
    return words.keep(lambda label, word: word == 0 or scores[label][word] >= least)
