"""From log-probabilities at masks to labels: a verbalizer with its words and its calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.prompt import masks
from bmkit.prompt.ask import Asker, Question
from bmkit.prompting.encode import Encoded
from bmkit.prompting.labelwords import LabelWords
from bmkit.verbalizers import calibration, manual
from bmkit.verbalizers.manual import Columns
from bmkit.verbalizers.wordweights import WordWeights

Handler = Literal["first", "mean", "max", "likelihood"]
Over = Literal["logarithms", "probabilities"]
FILE = "verbalizer.safetensors"


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
    module: WordWeights | None = None
    """What is trained: how much words count, if they don't count alike."""
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

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels in their order."""
        return self.words.labels

    def ask(
        self, asker: Asker, prompts: Sequence[Encoded], done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Return what a model says of prompts, [rows, choices], to be given to the others here."""
        return asker.logprobs(prompts, self.question, done)

    def said(self, asker: Asker, prompts: Sequence[Encoded]) -> Tensor:
        """Return the same with gradients, in one batch."""
        if self.handler == "likelihood":
            return asker.score(prompts, self.question).float().cpu()
        found = masks.logits(asker.model, prompts, asker.kind).float().log_softmax(-1)
        return found[:, self.columns.token_ids.to(found.device)].cpu()

    def loss(self, said: Tensor, right: Tensor) -> Tensor:
        """Return the summed loss of what was `said`, a number; `right` as `targets` makes it."""
        if self.several:
            scores = self._scores(said)
            return functional.binary_cross_entropy_with_logits(scores, right, reduction="sum")
        return functional.nll_loss(self.label_logprobs(said), right, reduction="sum")

    def targets(self, right: Sequence[tuple[int, ...]]) -> Tensor:
        """Return rows' labels as numbers [rows], or whether they have each [rows, labels]."""
        if not self.several:
            return torch.tensor([own[0] for own in right])
        found = torch.zeros(len(right), len(self.labels))
        for row, own in zip(found, right, strict=True):
            row[list(own)] = 1.0
        return found

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
        if self.several:
            return functional.logsigmoid(self._scores(said))
        words = manual.normalise(self.word_scores(said), self.columns.words)
        if self.prior is not None:
            words = calibration.apply(words, self.prior)
        weights = None if self.module is None else self.module.logits.to(words.device)
        return manual.aggregate(words, self.columns.words, self.over, weights)

    def _scores(self, said: Tensor) -> Tensor:
        """Return the scores of labels of which a row may have several, [rows, labels]."""
        scores = self.word_scores(said)
        if self.prior is not None:
            scores = calibration.relative(scores, self.prior)
        return manual.label_scores(scores, self.columns.words)

    def chosen(self, logprobs: Tensor) -> list[tuple[int, ...]]:
        """Return the labels of each row, by log-probabilities of labels [rows, labels]."""
        if not self.several:
            return [(int(at),) for at in logprobs.argmax(-1)]
        above = logprobs > math.log(0.5)
        return [tuple(row.nonzero()[:, 0].tolist()) for row in above]

    def weighted(self) -> Verbalizer:
        """Return the verbalizer with weights of words to be trained, which are all alike."""
        return replace(self, module=WordWeights(*self.columns.words.shape))

    def save(self, folder: Path) -> None:
        """Write the weights of words, if there are any."""
        if self.module is not None:
            self.module.save(folder / FILE)

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
