"""What a model says of itself before it is trained, so that it doesn't forget how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bmkit import env
from bmkit.data.chat import IGNORED, Encoded, Example
from bmkit.plan import Job, read_headers
from bmkit.runtime import family
from bmkit.runtime.voice import Voice
from bmkit.train import corpus
from bmkit.tune.recipe import OWN_LONGEST

ROWS = 8


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
    made is kept in `job.work`, where a stopped run goes on. The fused decoder says it in float32
    where it can, whatever is trained in. Raises InputError if it says nothing.
    """
    longest = min(max_length, OWN_LONGEST)
    if device.type == "cpu" and family.covers(read_headers(job.checkpoint).config):
        dtype = "auto"
    texts = corpus.gather(
        lambda: Voice(job.checkpoint, device=device, dtype=dtype, rows=ROWS, reporter=job.reporter),
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
