"""From log-probabilities at masks to labels: a verbalizer with its words and its calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bmkit.prompting.labelwords import LabelWords
from bmkit.verbalizers import calibration, manual
from bmkit.verbalizers.manual import Columns, Handler

Over = Literal["logarithms", "probabilities"]


@dataclass(frozen=True)
class Verbalizer:
    """Words of labels, how they make a label's score, and what is divided away."""

    words: LabelWords
    columns: Columns
    handler: Handler = "first"
    over: Over = "logarithms"
    several: bool = False
    """Whether a row has any number of labels; they don't compete then."""
    prior: Tensor | None = None
    """[labels, words]: log-probabilities of words without a row; -inf where there is none."""

    @property
    def token_ids(self) -> Tensor:
        """Return the tokens whose log-probabilities are asked for, [columns]."""
        return self.columns.token_ids

    def calibrated(self, logprobs: Tensor) -> Verbalizer:
        """Return the verbalizer with its prior by `logprobs` [rows, columns] at masks."""
        scores = manual.word_scores(logprobs, self.columns, self.handler)
        if self.several:  # how likely words are among all tokens
            prior = scores.logsumexp(0) - math.log(len(scores))
        else:
            prior = calibration.prior(manual.normalise(scores, self.columns.words))
        return replace(self, prior=prior)

    def label_logprobs(self, logprobs: Tensor) -> Tensor:
        """Return log-probabilities of labels, [rows, labels], of those at masks, [rows, columns].

        Where a row has several labels, each is that of having it.
        """
        if not self.several:
            return manual.label_logprobs(
                logprobs, self.columns, self.handler, prior=self.prior, over=self.over
            )
        scores = manual.word_scores(logprobs, self.columns, self.handler)
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


def verbalizer(
    words: LabelWords,
    handler: Handler,
    over: Over,
    *,
    several: bool,
    prior: list[list[float]] | None = None,
) -> Verbalizer:
    """Return the verbalizer of resolved words, and of the prior that was kept, if any."""
    columns = Columns.of(words)
    held = None
    if prior is not None:
        held = torch.full(columns.words.shape, -torch.inf)
        for row, own in zip(held, prior, strict=True):
            row[: len(own)] = torch.tensor(own)
    return Verbalizer(words, columns, handler, over, several, held)
