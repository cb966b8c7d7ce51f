"""From log-probabilities at masks to labels: a verbalizer with its words and its calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from bmkit.prompt.ask import Question
from bmkit.prompting.labelwords import LabelWords
from bmkit.verbalizers import calibration, manual
from bmkit.verbalizers.manual import Columns

Handler = Literal["first", "mean", "max", "likelihood"]
Over = Literal["logarithms", "probabilities"]


@dataclass(frozen=True)
class Verbalizer:
    """Words of labels, how they make a label's score, and what is divided away."""

    words: LabelWords
    handler: Handler = "first"
    combine: Literal["sum", "mean"] = "sum"
    """Of `likelihood`: a word has that of all of its tokens, or the mean of theirs."""
    over: Over = "logarithms"
    several: bool = False
    """Whether a row has any number of labels; they don't compete then."""
    prior: Tensor | None = None
    """[labels, words]: log-probabilities of words without a row; -inf where there is none."""

    @cached_property
    def columns(self) -> Columns:
        """Return where words, and their tokens, stand among the scores."""
        return Columns.of(self.words)

    @property
    def question(self) -> Question:
        """Return what is asked of each prompt: the words, or each of their tokens by itself."""
        if self.handler == "likelihood":
            return Question([word.ids for word in self.words.flat], self.combine, behind=True)
        return Question([[token] for token in self.words.token_ids])

    def word_scores(self, said: Tensor) -> Tensor:
        """Return the scores of words, [rows, labels, words], of what was said, [rows, choices]."""
        if self.handler == "likelihood":
            return self.columns.arrange(said)
        return manual.word_scores(said, self.columns, self.handler)

    def calibrated(self, said: Tensor) -> Verbalizer:
        """Return the verbalizer with its prior by what was `said` [rows, choices]."""
        scores = self.word_scores(said)
        if self.several:  # how likely words are among all that could be said
            prior = scores.logsumexp(0) - math.log(len(scores))
        else:
            prior = calibration.prior(manual.normalise(scores, self.columns.words))
        return replace(self, prior=prior)

    def label_logprobs(self, said: Tensor) -> Tensor:
        """Return log-probabilities of labels, [rows, labels], of what was said, [rows, choices].

        Where a row has several labels, each is that of having it.
        """
        scores = self.word_scores(said)
        if not self.several:
            words = manual.normalise(scores, self.columns.words)
            if self.prior is not None:
                words = calibration.apply(words, self.prior)
            return manual.aggregate(words, self.columns.words, self.over)
        if self.prior is not None:
            scores = calibration.relative(scores, self.prior)
        return torch.nn.functional.logsigmoid(manual.label_scores(scores, self.columns.words))

    def chosen(self, logprobs: Tensor) -> list[tuple[int, ...]]:
        """Return the labels of each row, by log-probabilities of labels [rows, labels]."""
        if not self.several:
            return [(int(at),) for at in logprobs.argmax(-1)]
        above = logprobs > math.log(0.5)
        return [tuple(row.nonzero()[:, 0].tolist()) for row in above]

    def kept_prior(self) -> list[list[float]] | None:
        """Return the prior as an artifact keeps it: by label, of each word."""
        if self.prior is None:
            return None
        sizes = [len(own) for own in self.words.words]
        return [row[:size].tolist() for row, size in zip(self.prior, sizes, strict=True)]

    def with_prior(self, kept: Sequence[Sequence[float]]) -> Verbalizer:
        """Return the verbalizer with the prior that was kept."""
        prior = torch.full(self.columns.words.shape, -torch.inf)
        for row, own in zip(prior, kept, strict=True):
            row[: len(own)] = torch.tensor(own)
        return replace(self, prior=prior)
