"""What a model says of itself before it is trained, so that it doesn't forget how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bmkit import env
from bmkit.data.chat import IGNORED, Encoded, Example
from bmkit.plan import Job, read_headers
from bmkit.runtime import family
from bmkit.runtime.budget import Sizes
from bmkit.runtime.voice import Voice
from bmkit.train import corpus
from bmkit.tune.recipe import OWN_LONGEST

ROWS = 8
MANY_ROWS = 64
"""As many at a time with AMX, whose products want rows,"""
MOST_CACHE = 2**30
"""if their keys and values take no more bytes."""


@dataclass(frozen=True)
class _Amount:
    tokens: int
    sequence_length: int
    max_new_tokens: int
    temperature: float = 1.0


def own_words(
    job: Job, tokens: int, tokenizer: Any, *, max_length: int, dtype: str, device: torch.device
) -> Encoded:
    """Return chats whose answers have `tokens` tokens; the model of `job` makes up both sides.

    They are drawn as it is likely to say them, so that learning them asks for no change. What is
    made is kept in `job.work`, where a stopped run goes on. On the CPU the fused decoder says it in
    float32 where it can, whatever is trained in, unless the processor has AMX: with that bfloat16
    is twice as quick. Raises InputError if it says nothing.
    """
    longest = min(max_length, OWN_LONGEST)
    rows, config = ROWS, read_headers(job.checkpoint).config
    if device.type == "cpu" and dtype == "bfloat16" and env.has_amx():
        sizes = Sizes.of(config)
        cache = 4 * sizes.layers * sizes.kv * sizes.dim * longest  # of a row, in bytes
        rows = max(ROWS, min(MANY_ROWS, MOST_CACHE // max(cache, 1)))
    elif device.type == "cpu" and family.covers(config):
        dtype = "auto"
    texts = corpus.gather(
        lambda: Voice(job.checkpoint, device=device, dtype=dtype, rows=rows, reporter=job.reporter),
        tokenizer,
        _Amount(tokens, longest, longest // 2),
        None,
        job.work / f"own-words-{env.process()[0]}",
        likeliest=None,
        seed=job.recipe.seed,
        reporter=job.reporter,
    )
    examples: list[Example] = [
        {"input_ids": t.ids, "labels": [*[IGNORED] * t.first, *t.ids[t.first :]]} for t in texts
    ]
    return Encoded(examples, 0, 0)
