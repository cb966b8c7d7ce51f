"""Beam search for texts that many rows make likely together (LM-BFF, arXiv 2012.15723)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Beam:
    """What was said so far, the first sentinel included, and its log-likelihood over all rows."""

    tokens: tuple[int, ...]
    score: float
    gap: int = 0
    """The gap that is written now."""
    done: bool = False


def search(
    step: Callable[[Sequence[int]], Tensor],
    *,
    sentinels: Sequence[int],
    end: int,
    width: int,
    max_new_tokens: int,
    banned: Tensor,
    once: Tensor,
    heard: Callable[[], None] = lambda: None,
) -> list[Beam]:
    """Return whole texts for gaps, the likeliest first; `width` of them at most.

    `step` tells of tokens said so far the log-probabilities of the next one, [vocabulary], summed
    over rows. Gap number i begins behind `sentinels` i and ends at the next one, of which there is
    one more than gaps; the last gap may also end at `end`. Tokens `banned` [vocabulary] are never
    said, those of `once` not twice in a row. What isn't whole after `max_new_tokens` is dropped. Of
    equals, the lower tokens come first. `heard` is called after each token.
    """
    beams = [Beam((sentinels[0],), 0.0)]
    for _ in range(max_new_tokens):
        if all(beam.done for beam in beams):
            break
        pool = [beam for beam in beams if beam.done]
        for beam in beams:
            if not beam.done:
                pool += _longer(beam, step(beam.tokens), sentinels, end, width, banned, once)
        beams = sorted(pool, key=lambda beam: (-beam.score, beam.tokens))[:width]
        heard()
    return [beam for beam in beams if beam.done]


def _longer(
    beam: Beam,
    logprobs: Tensor,
    sentinels: Sequence[int],
    end: int,
    width: int,
    banned: Tensor,
    once: Tensor,
) -> list[Beam]:
    ends = [sentinels[beam.gap + 1]]
    if beam.gap == len(sentinels) - 2:
        ends.append(end)
    barred = banned.clone()
    barred[[*sentinels, end]] = True
    barred[ends] = False
    if once[beam.tokens[-1]]:
        barred[beam.tokens[-1]] = True
    scores, order = logprobs.masked_fill(barred, -torch.inf).sort(descending=True, stable=True)
    found = []
    for score, token in zip(scores[:width].tolist(), order[:width].tolist(), strict=True):
        if score == -torch.inf:
            break
        ended = token in ends
        gap = beam.gap + ended
        done = ended and gap == len(sentinels) - 1
        found.append(Beam((*beam.tokens, token), beam.score + score, gap, done))
    return found


def parts(beam: Beam, sentinels: Sequence[int]) -> list[list[int]]:
    """Return the tokens of each gap of a whole text."""
    found: list[list[int]] = []
    for token in beam.tokens[:-1]:
        if token in sentinels:
            found.append([])
        else:
            found[-1].append(token)
    return found
