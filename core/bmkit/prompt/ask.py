"""Ask a model how likely texts are at masks: rows of like length together, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.prompt import masks
from bmkit.prompting.encode import Encoded, Kind
from bmkit.verbalizers import likelihood
from bmkit.verbalizers.likelihood import Likelihoods

ON_CPU = 512
"""Tokens in a batch on the CPU: products of more are not quicker, and rows need more padding."""
PART_BATCHES = 16
"""So many batches are asked between two signs of life."""


@dataclass(frozen=True)
class Question:
    """What is asked of each prompt."""

    choices: Sequence[Sequence[int]]
    """The tokens of each text that may stand at the mask."""
    by: Literal["sum", "mean"] = "sum"
    """A text has the log-likelihood of all of its tokens, or the mean of theirs."""
    behind: bool = False
    """Whether what is behind a causal prompt's mask counts, given the text."""


class Asker:
    """A model that tells how likely texts are at masks."""

    def __init__(self, model: Any, kind: Kind, mask_token: int | None, batch_tokens: int) -> None:
        """Take a model in eval mode; a batch has `batch_tokens` at most, padding included."""
        self.model, self.kind, self.mask_token = model, kind, mask_token
        self.batch_tokens = batch_tokens
        if model.device.type == "cpu":
            self.batch_tokens = min(batch_tokens, ON_CPU)

    @torch.inference_mode()
    def logprobs(
        self,
        prompts: Sequence[Encoded],
        question: Question,
        done: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return log-probabilities of the choices at masks: float32 [rows, choices].

        `done` hears from time to time how many rows more there are. Peak memory: the activations
        of one batch, and its logits at masks. Raises InputError if the model's output is not a
        number.
        """

        return self._gathered(prompts, PART_BATCHES, lambda p: self.score(p, question), done)

    @torch.inference_mode()
    def states(
        self, prompts: Sequence[Encoded], done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Return what the head reads at masks: float32 [rows, hidden_size]; else as above."""
        return self._gathered(prompts, 1, lambda p: masks.states(self.model, p, self.kind), done)

    @torch.inference_mode()
    def each(
        self,
        prompts: Sequence[Encoded],
        ask: Callable[[list[Encoded]], Tensor],
        done: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return what `ask` tells of batches of prompts, float32 [rows, values]; else as above."""
        return self._gathered(prompts, 1, ask, done)

    @torch.inference_mode()
    def vocabulary(
        self, prompts: Sequence[Encoded], done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Return log-probabilities of all tokens at masks: float32 [rows, vocabulary]."""

        def ask(part: list[Encoded]) -> Tensor:
            return masks.logits(self.model, part, self.kind).float().log_softmax(-1)

        return self._gathered(prompts, 1, ask, done)

    @torch.inference_mode()
    def prior(self, prompts: Sequence[Encoded]) -> Tensor:
        """Return how likely each token is at the mask, on the mean of prompts, [vocabulary].

        That is the logarithm of the mean probability, in float32.
        """
        total: Tensor | None = None
        for places in self._parts(prompts, 1):
            said = masks.logits(self.model, [prompts[at] for at in places], self.kind)
            shares = said.float().softmax(-1).sum(0)
            total = shares if total is None else total + shares
        if total is None:
            raise ValueError("there are no prompts")
        return (total / len(prompts)).log().cpu()

    def _gathered(
        self,
        prompts: Sequence[Encoded],
        batches: int,
        ask: Callable[[list[Encoded]], Tensor],
        done: Callable[[int], None] | None,
    ) -> Tensor:
        """Return what is told of parts of so many batches, in the order of prompts."""
        found: Tensor | None = None
        for places in self._parts(prompts, batches):
            values = ask([prompts[at] for at in places])
            if not values.isfinite().all():
                raise InputError("the model's output is not a number; its weights are damaged")
            if found is None:
                found = torch.empty(len(prompts), values.shape[1])
            found[places] = values.float().cpu()
            if done is not None:
                done(len(places))
        if found is None:
            raise ValueError("there are no prompts")
        return found

    def score(self, prompts: Sequence[Encoded], question: Question) -> Tensor:
        """Return the same as `logprobs`, where the model is and with gradients if torch has them.

        Nothing is checked.
        """
        said = self._score(prompts, question)
        return said.sums if question.by == "sum" else said.means

    def _score(self, prompts: Sequence[Encoded], question: Question) -> Likelihoods:
        if self.kind == "causal" and not question.behind:
            ids = [prompt.ids for prompt in prompts]
            return likelihood.causal(
                self.model, ids, question.choices, batch_tokens=self.batch_tokens
            )
        return likelihood.score(
            self.model,
            prompts,
            self.kind,
            question.choices,
            mask_token=self.mask_token,
            batch_tokens=self.batch_tokens,
        )

    def _parts(self, prompts: Sequence[Encoded], batches: int) -> Iterator[list[int]]:
        """Yield places of prompts of like length, the longest first, for so many batches."""
        lengths = [len(p.ids) + len(p.behind) + len(p.decoder_ids) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda at: lengths[at], reverse=True)
        part: list[int] = []
        tokens = 0
        for at in order:
            if part and tokens + lengths[at] > batches * self.batch_tokens:
                yield part
                part, tokens = [], 0
            part.append(at)
            tokens += lengths[at]
        if part:
            yield part
