"""Learning from a teacher: its distribution at each place, kept as its likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Taught:
    """What a teacher said behind each token of a text: its `k` likeliest next tokens."""

    tokens: Tensor
    """int32 [places, k], the likeliest first."""
    logprobs: Tensor
    """float16 [places, k], natural."""


def likeliest(logits: Tensor, count: int) -> Taught:
    """Keep of `logits` [places, vocabulary] the `count` likeliest tokens of each place."""
    top = logits.float().topk(count)
    logprobs = top.values - logits.float().logsumexp(-1, keepdim=True)
    return Taught(top.indices.int(), logprobs.half())


def divergence(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return the summed cross-entropy of a student's `logits` [places, vocabulary] to a teacher.

    The teacher's distribution is given by its likeliest `tokens` [places, k] and their `logprobs`
    (minus infinity: left out); what it gives to others counts for nothing. With a temperature both
    are softened first, and the loss is scaled by its square, so that gradients stay as large
    (Distilling the Knowledge in a Neural Network, arXiv 1503.02531). Memory: a float32 copy of
    `logits`.
    """
    student = logits.float() / temperature
    teacher = logprobs.float() / temperature
    share = teacher.softmax(-1) if temperature != 1.0 else teacher.exp()
    known = student.gather(1, tokens.long()) - student.logsumexp(-1, keepdim=True)
    return -(share * known).sum() * temperature**2


def teaching_loss(
    model: Any, batch: dict[str, Tensor], *, temperature: float, rows: Tensor | None = None
) -> tuple[Tensor, int]:
    """Return the summed divergence of a batch, and how many places it has.

    `batch` holds `input_ids` and `attention_mask` [batch, time], and of the places that count:
    `places` [count, 2] (row, time), `tokens` and `logprobs` [count, k]. With `rows`, only those
    rows of the output head are learned: `tokens` are their numbers among them, -1 for others.
    """
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = body.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    places, tokens, logprobs = batch["places"], batch["tokens"], batch["logprobs"]
    picked = hidden[places[:, 0], places[:, 1]]  # [count, hidden]
    head = body.get_output_embeddings()
    weight = head.weight if rows is None else head.weight[rows]
    total = picked.new_zeros(())
    for low in range(0, len(picked), 256):  # so that logits of a few places are there at a time
        part = slice(low, low + 256)
        logits = functional.linear(picked[part], weight)
        there = tokens[part] >= 0
        logged = logprobs[part].float().masked_fill(~there, -torch.inf)
        safe = tokens[part].clamp_min(0)
        total = total + divergence(logits, safe, logged, temperature=temperature)
    return total, len(picked)
