"""How surprised a model is by given text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bmkit.compress.calibrate import inputs
from bmkit.errors import InputError
from bmkit.runtime.voice import Voice


@torch.inference_mode()
def _said(model: Any, row: Sequence[int]) -> Iterator[Tensor]:
    whole = torch.tensor(row, device=model.device)
    yield model(**inputs(model.config, whole), use_cache=False).logits[0]


def of(voice: Voice, rows: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of rows of token ids: e to the mean of -log p, first tokens left out.

    An encoder-decoder reads half of a row, and is judged by the rest. Raises InputError
    if there is nothing to predict, or if the model's output is no number.
    """
    total, count = 0.0, 0
    for row in rows:
        at = 1
        parts = voice.logits(list(row[:-1]), 0)
        if voice.decoder is None and voice.model.config.is_encoder_decoder:
            at, parts = len(row) // 2, _said(voice.model, row)
        for logits in parts:
            wanted = torch.tensor(row[at : at + len(logits)], device=logits.device)
            log = logits.float().log_softmax(-1).gather(-1, wanted[:, None])
            total -= float(log.double().sum())
            at += len(logits)
            count += len(logits)
    if not count:
        raise InputError("there is no text to measure perplexity on")
    if not math.isfinite(total):
        raise InputError("the model's output is not a number; its weights are damaged")
    return math.exp(min(total / count, 700.0))
