"""Choosing tokens: random draws that don't depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Chosen:
    """The log-probability of a chosen token, and the likeliest ones with theirs."""

    logprob: float
    top: list[tuple[int, float]]


def judge(scores: Tensor, token: int, top: int) -> Chosen:
    """Say what `scores` [vocabulary] tell of `token` and of the `top` likeliest."""
    logprobs = scores.float().log_softmax(-1)
    found = logprobs.topk(min(top, len(logprobs)))
    pairs = list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
    return Chosen(float(logprobs[token]), pairs)


class Told(LogitsProcessor):  # type: ignore[misc]
    """Stands first among processors and remembers what the model itself says."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.before: Tensor | None = None
        self.steps: list[list[Chosen]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary] as they are."""
        self._close(input_ids[:, -1])
        self.before = scores.float().log_softmax(-1)
        return scores

    def _close(self, tokens: Tensor) -> None:
        if self.before is not None:
            pairs = zip(self.before, tokens.tolist(), strict=True)
            self.steps.append([judge(row, token, self.top) for row, token in pairs])

    def chosen(self, made: Tensor) -> list[list[Chosen]]:
        """Return for each row of `made` [batch, tokens] what was said of its tokens."""
        self._close(made[:, -1])
        return [list(row) for row in zip(*self.steps, strict=True)]


class SeededDraw(LogitsProcessor):  # type: ignore[misc]
    """Make the likeliest token a random draw, each row from a generator of its own.

    Adding Gumbel noise to log-probabilities and taking the largest draws from their distribution
    (the Gumbel-max trick, arXiv 1611.01144). So a prompt's answer depends on the seed and its
    number, not on the batch that it happens to be in.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def ahead(self) -> SeededDraw:
        """Return one that draws the same from now on, and leaves this one as it is."""
        found = SeededDraw([])
        found.generators = [g.clone_state() for g in self.generators]
        return found

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary] with fresh noise added."""
        rows = [torch.empty(scores.shape[-1]).exponential_(generator=g) for g in self.generators]
        noise = -torch.stack(rows).clamp_min(1e-30).log()  # [batch, vocabulary]
        return scores.float() + noise.to(scores.device)


class RepetitionPenalty(LogitsProcessor):  # type: ignore[misc]
    """Make tokens that were there before less likely, as CTRL does (arXiv 1909.05858).

    Unlike transformers' own it does not count padding: else a short prompt's answer would depend
    on the longest prompt of its batch.
    """

    def __init__(self, penalty: float, padding: Sequence[int]) -> None:
        self.penalty, self.padding = penalty, torch.tensor(padding)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary] with those of tokens in `input_ids` lowered."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)  # [time]
        counts = places[None] >= self.padding.to(input_ids.device)[:, None]  # [batch, time]
        seen = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
        seen.scatter_reduce_(1, input_ids, counts.to(torch.int8), "amax")
        lowered = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen.bool(), lowered, scores)


def processors(
    seeds: Sequence[int], *, temperature: float, top_k: int, top_p: float, min_p: float
) -> LogitsProcessorList:
    """Return what turns logits into draws: temperature, then top-k, top-p and min-p, then noise."""
    steps = LogitsProcessorList()
    if temperature != 1.0:
        steps.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        steps.append(MinPLogitsWarper(min_p))
    steps.append(SeededDraw(seeds))
    return steps


def row_seed(seed: int, row: int) -> int:
    """Return the seed of one prompt: a hash of the run's seed and the prompt's number."""
    mixed = (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
    mixed ^= mixed >> 31
    return (mixed * 0x94D049BB133111EB & (2**64 - 1)) >> 1
