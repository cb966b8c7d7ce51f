"""Choosing tokens: random draws that don't depend on what else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
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


class TopP(LogitsProcessor):  # type: ignore[misc]
    """Leave the fewest likeliest tokens that make up `share`: nucleus sampling, arXiv 1904.09751.

    What transformers' own leaves, without sorting the whole vocabulary.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary], minus infinity where a token is left out."""
        whole = scores.shape[-1]
        total = scores.float().logsumexp(-1, keepdim=True)
        count = min(512, whole)
        while True:
            top, places = scores.topk(count)  # falling
            chances = (top.float() - total).exp()
            before = chances.cumsum(-1) - chances
            if count == whole or bool((before[:, -1] >= self.share).all()):
                break
            count = min(count * 8, whole)
        kept = top.masked_fill(before >= self.share, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter_(1, places, kept)


class MinP(LogitsProcessor):  # type: ignore[misc]
    """Leave out what is less likely than `share` of the likeliest (arXiv 2407.01082)."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary], minus infinity where a token is left out."""
        least = scores.amax(-1, keepdim=True) + math.log(self.share)
        return scores.masked_fill(scores < least, -torch.inf)


class SeededDraw(LogitsProcessor):  # type: ignore[misc]
    """Make the likeliest token a random draw.

    Adding Gumbel noise to log-probabilities and taking the largest draws from their distribution
    (the Gumbel-max trick, arXiv 1611.01144). The noise is a hash of a row's seed, of the place in
    its answer and of the token: so an answer depends on the seed and the prompt's number, not on
    the batch that it happens to be in, nor on what was guessed of it.
    """

    def __init__(self, seeds: Sequence[int], start: int = 0) -> None:
        self.seeds, self.start = list(seeds), start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary] with noise added; the answer began at `start`.

        On the CPU those are minus infinity that noise can't make the largest.
        """
        place = input_ids.shape[1] - self.start
        add = _contest if scores.device.type == "cpu" else _noised
        rows = zip(scores.float(), self.seeds, strict=True)
        return torch.stack([add(row, seed, place) for row, seed in rows])


def _noised(scores: Tensor, seed: int, place: int) -> Tensor:
    """Return `scores` [vocabulary] with noise."""
    return scores + gumbel(seed, place, torch.arange(len(scores), device=scores.device))


def _contest(scores: Tensor, seed: int, place: int) -> Tensor:
    """Return `scores` [vocabulary] with noise where that may make the largest, else -infinity.

    Noise is -log(-log(u)), which is at most -log(1 - u): cheap to say for all tokens. Exact noise
    for the one that is largest by it is a bar that others have to reach by it.
    """
    rest = _rest(seed, place, len(scores))
    most = rest.astype(np.float32)
    most += np.float32(0.5)
    most *= np.float32(2.0**-52)
    np.negative(np.log(most, out=most), out=most)
    most += scores.numpy()
    first = int(most.argmax())
    share = (2**52 - 1 - int(rest[first]) + 0.5) * 2.0**-52
    bar = float(scores[first]) - math.log(-math.log(share))
    # It is below its own bound, but for rounding; what isn't a number is below nothing.
    at = torch.from_numpy(np.flatnonzero(~(most < bar - ROUNDING * (1 + abs(bar)))))
    found = torch.full_like(scores, -torch.inf)
    found[at] = scores[at] + gumbel(seed, place, at)
    return found


ROUNDING = 1e-5
"""What float32 may have rounded off a bound, as a share of it."""
GOLDEN, ROUNDS = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Of splitmix64, which makes a random number of a seed, a place and a token."""


def gumbel(seed: int, place: int, tokens: Tensor) -> Tensor:
    """Return Gumbel noise for each of `tokens`, float32, the same whenever it is asked for."""
    key = row_seed(seed, place)
    x = tokens.long() * _signed(GOLDEN) + _signed(key * ROUNDS[0][1])
    for shift, factor in (*ROUNDS, (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    share = (((x >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52  # in (0, 1)
    return share.log_().neg_().log_().neg_().float()


def _rest(seed: int, place: int, size: int) -> NDArray[np.int64]:
    """Return for `size` tokens the 52 bits of 1 - u, of the u that `gumbel` makes noise of."""
    x = _every(size) + np.uint64(row_seed(seed, place) * ROUNDS[0][1] & (2**64 - 1))
    for shift, factor in ROUNDS:
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    np.invert(x, out=x)
    x >>= np.uint64(12)
    return x.view(np.int64)


@lru_cache(4)
def _every(size: int) -> NDArray[np.uint64]:
    return np.arange(size, dtype=np.uint64) * np.uint64(GOLDEN)


def _signed(value: int) -> int:
    """Return a number of 64 bits as torch's int64 holds it."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


class RepetitionPenalty(LogitsProcessor):  # type: ignore[misc]
    """Make tokens that were there before less likely, as CTRL does (arXiv 1909.05858).

    Unlike transformers' own it does not count padding: else a short prompt's answer would depend
    on the longest prompt of its batch. Nor does it look at tokens that can't be said, as the soft
    ones of a prompt.
    """

    def __init__(self, penalty: float, padding: Sequence[int]) -> None:
        self.penalty, self.padding = penalty, torch.tensor(padding)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary] with those of tokens in `input_ids` lowered."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)  # [time]
        counts = places[None] >= self.padding.to(input_ids.device)[:, None]  # [batch, time]
        counts &= input_ids < scores.shape[1]
        seen = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
        sayable = input_ids.clamp(max=scores.shape[1] - 1)
        seen.scatter_reduce_(1, sayable, counts.to(torch.int8), "amax")
        lowered = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen.bool(), lowered, scores)


def limits(
    more: Mapping[str, Any],
    *,
    start: int,
    eos: Sequence[int],
    device: torch.device | str,
    most: int | None = None,
) -> LogitsProcessorList:
    """Return what keeps tokens from being chosen, or prefers some, by GenerationConfig's names.

    They are transformers' own, in its order. `start` is where answers begin, `eos` ends them,
    `most` is how long prompt and answer can be.
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
    if (first := more.get("forced_bos_token_id")) is not None:
        steps.append(ForcedBOSTokenLogitsProcessor(first))
    if (last := more.get("forced_eos_token_id")) is not None and most is not None:
        steps.append(ForcedEOSTokenLogitsProcessor(most, last, device))
    if (decay := more.get("exponential_decay_length_penalty")) and ends:
        steps.append(ExponentialDecayLengthPenalty(tuple(decay), ends, start))
    if never := more.get("suppress_tokens"):
        steps.append(SuppressTokensLogitsProcessor(list(never), device))
    if begin := more.get("begin_suppress_tokens"):
        steps.append(SuppressTokensAtBeginLogitsProcessor(list(begin), start, device))
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
    start: int = 0,
) -> LogitsProcessorList:
    """Return what turns logits into draws: temperature, then what is left out, then noise.

    `start` is where answers begin.
    """
    steps = LogitsProcessorList()
    if temperature != 1.0:
        steps.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(TopP(top_p))
    if min_p > 0.0:
        steps.append(MinP(min_p))
    if typical_p < 1.0:
        steps.append(TypicalLogitsWarper(typical_p))
    if epsilon_cutoff > 0.0:
        steps.append(EpsilonLogitsWarper(epsilon_cutoff))
    if eta_cutoff > 0.0:
        steps.append(EtaLogitsWarper(eta_cutoff))
    steps.append(SeededDraw(seeds, start))
    return steps


def row_seed(seed: int, row: int) -> int:
    """Return the seed of one prompt: a hash of the run's seed and the prompt's number."""
    mixed = (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
    mixed ^= mixed >> 31
    return (mixed * 0x94D049BB133111EB & (2**64 - 1)) >> 1
