"""Ask a model how likely texts are at masks: rows of like length together, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.prompting.encode import Encoded, Kind
from bmkit.verbalizers import likelihood, positions
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
        found = torch.empty(len(prompts), len(question.choices))
        for places in self._parts(prompts):
            said = self._score([prompts[at] for at in places], question)
            values = said.sums if question.by == "sum" else said.means
            if not values.isfinite().all():
                raise InputError("the model's output is not a number; its weights are damaged")
            found[places] = values.float().cpu()
            if done is not None:
                done(len(places))
        return found

    @torch.inference_mode()
    def prior(self, prompts: Sequence[Encoded]) -> Tensor:
        """Return how likely each token is at the mask, on the mean of prompts, [vocabulary].

        That is the logarithm of the mean probability, in float32.
        """
        whole = self.kind == "seq2seq"
        asked = [prompt.decoder_ids if whole else prompt.ids for prompt in prompts]
        lengths = [len(p.ids) + len(p.decoder_ids) for p in prompts]
        reads, most = [1] * len(prompts), positions.most_reads(self.model)
        total = torch.zeros(positions.vocabulary(self.model), device=self.model.device)
        pad = positions.pad_of(self.model)
        for part in positions.batches(lengths, reads, self.batch_tokens, most):
            ids, mask = positions.padded([prompts[at].ids for at in part], pad, self.model.device)
            inputs = {"input_ids": ids, "attention_mask": mask}
            if whole:
                said, _ = positions.padded([asked[at] for at in part], pad, self.model.device)
                inputs["decoder_input_ids"] = said
            columns = torch.tensor([prompts[at].reads[0] for at in part], device=ids.device)
            rows = torch.arange(len(part), device=ids.device)
            width = max(len(asked[at]) for at in part)
            logits = positions.logits_at(self.model, inputs, width, rows, columns)
            total += logits[:, : len(total)].float().softmax(-1).sum(0)
        return (total / len(prompts)).log().cpu()

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

    def _parts(self, prompts: Sequence[Encoded]) -> Iterator[list[int]]:
        """Yield places of prompts of like length, the longest first."""
        lengths = [len(p.ids) + len(p.behind) + len(p.decoder_ids) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda at: lengths[at], reverse=True)
        part: list[int] = []
        tokens = 0
        for at in order:
            if part and tokens + lengths[at] > PART_BATCHES * self.batch_tokens:
                yield part
                part, tokens = [], 0
            part.append(at)
            tokens += lengths[at]
        if part:
            yield part
