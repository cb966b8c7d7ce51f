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
    share = teacher.softmax(-1).nan_to_num(0.0) if temperature != 1.0 else teacher.exp()
    known = student.gather(1, tokens.long()) - student.logsumexp(-1, keepdim=True)
    return -(share * known).sum() * temperature**2


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Tell whether logits are the last hidden states times the head's weight, and nothing else.

    Some models add a bias, scale them or cap them.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "weight"):
        return False
    training = model.training
    model.eval()  # dropout would tell them apart
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)
    model.train(training)
    found = functional.linear(hidden.last_hidden_state, head.weight).float()
    return found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-3, atol=1e-4)


def teaching_loss(
    model: Any,
    batch: dict[str, Tensor],
    *,
    temperature: float,
    rows: Tensor | None = None,
    plain: bool = True,
) -> tuple[Tensor, int]:
    """Return the summed divergence of a batch, and how many places it has.

    `batch` holds `input_ids` and `attention_mask` [batch, time], and of the places that count:
    `places` [count, 2] (row, time), `tokens` and `logprobs` [count, k]. With `rows`, only those
    rows of the output head are learned: `tokens` are their numbers among them, -1 for others.
    `plain` is what `has_plain_head` says: else the model makes all of its logits.
    """
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    places, tokens, logprobs = batch["places"], batch["tokens"], batch["logprobs"]
    if not plain:
        logits = body(**given, use_cache=False).logits[places[:, 0], places[:, 1]]
        logits = logits if rows is None else logits[:, rows]
        there = tokens >= 0
        logged = logprobs.float().masked_fill(~there, -torch.inf)
        safe = tokens.clamp_min(0)
        return divergence(logits, safe, logged, temperature=temperature), len(logits)
    hidden = getattr(body, body.base_model_prefix)(**given, use_cache=False).last_hidden_state
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
