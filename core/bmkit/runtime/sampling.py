"""Choosing tokens: random draws that don't depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
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


def limits(
    more: Mapping[str, Any], *, start: int, eos: Sequence[int], device: torch.device | str
) -> LogitsProcessorList:
    """Return what keeps tokens from being chosen, or prefers some, by GenerationConfig's names.

    They are transformers' own, in its order. `start` is where answers begin, `eos` ends them.
    """
    ends = list(eos)
    steps = LogitsProcessorList()
    if bias := more.get("sequence_bias"):
        steps.append(SequenceBiasLogitsProcessor([[list(ids), float(b)] for ids, b in bias]))
    if size := more.get("no_repeat_ngram_size"):
        steps.append(NoRepeatNGramLogitsProcessor(size))
    if words := more.get("bad_words_ids"):
        steps.append(NoBadWordsLogitsProcessor([list(ids) for ids in words], ends or None))
    if (least := more.get("min_new_tokens")) and ends:
        steps.append(MinNewTokensLengthLogitsProcessor(start, least, ends, device))
    if (decay := more.get("exponential_decay_length_penalty")) and ends:
        steps.append(ExponentialDecayLengthPenalty(tuple(decay), ends, start))
    if never := more.get("suppress_tokens"):
        steps.append(SuppressTokensLogitsProcessor(list(never), device))
    if first := more.get("begin_suppress_tokens"):
        steps.append(SuppressTokensAtBeginLogitsProcessor(list(first), start, device))
    return steps


def processors(
    seeds: Sequence[int],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float = 1.0,
    epsilon_cutoff: float = 0.0,
    eta_cutoff: float = 0.0,
) -> LogitsProcessorList:
    """Return what turns logits into draws: temperature, then what is left out, then noise."""
    steps = LogitsProcessorList()
    if temperature != 1.0:
        steps.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        steps.append(MinPLogitsWarper(min_p))
    if typical_p < 1.0:
        steps.append(TypicalLogitsWarper(typical_p))
    if epsilon_cutoff > 0.0:
        steps.append(EpsilonLogitsWarper(epsilon_cutoff))
    if eta_cutoff > 0.0:
        steps.append(EtaLogitsWarper(eta_cutoff))
    steps.append(SeededDraw(seeds))
    return steps


def row_seed(seed: int, row: int) -> int:
    """Return the seed of one prompt: a hash of the run's seed and the prompt's number."""
    mixed = (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
    mixed ^= mixed >> 31
    return (mixed * 0x94D049BB133111EB & (2**64 - 1)) >> 1
