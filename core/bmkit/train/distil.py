"""Learning from a teacher: its distribution at each place, kept as its likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


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


@dataclass(frozen=True)
class Aim:
    """What of a teacher's logits, and of the text, a student learns."""

    temperature: float = 1.0
    reverse: bool = False
    """Whether the divergence is that of the teacher from the student."""
    label_weight: float = 0.0
    """The share of the loss that is the cross-entropy of the text's own tokens."""
    rest: bool = False
    """Whether all tokens that aren't among the teacher's likeliest count as one."""

    def loss(self, logits: Tensor, tokens: Tensor, logprobs: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of `logits` [places, vocabulary], as `divergence` takes them.

        `labels` [places] are the text's own tokens; -1 is one that the head can't say.
        """
        total = logits.new_zeros((), dtype=torch.float32)
        if self.label_weight < 1:
            there = tokens >= 0
            logged = logprobs.float().masked_fill(~there, -torch.inf)
            safe = tokens.clamp_min(0)
            if self.reverse:
                found = reverse_divergence(logits, safe, logged)
            else:
                found = divergence(
                    logits, safe, logged, temperature=self.temperature, rest=self.rest
                )
            total = total + (1 - self.label_weight) * found
        if self.label_weight:
            own = functional.cross_entropy(
                logits.float(), labels.long(), ignore_index=-1, reduction="sum"
            )
            total = total + self.label_weight * own
        return total


def divergence(
    logits: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    *,
    temperature: float = 1.0,
    rest: bool = False,
) -> Tensor:
    """Return the summed cross-entropy of a student's `logits` [places, vocabulary] to a teacher.

    The teacher's distribution is given by its likeliest `tokens` [places, k] and their `logprobs`
    (minus infinity: left out). What it gives to others counts for nothing, so that a student learns
    to say none of them; with `rest` (at temperature 1) it counts as one more token, which all
    others of the student are as well. With a temperature both are softened first, the teacher's
    among the tokens that are known, and the loss is scaled by its square, so that gradients stay as
    large (Distilling the Knowledge in a Neural Network, arXiv 1503.02531). Memory: a float32 copy
    of `logits`.
    """
    student = logits.float() / temperature
    teacher = logprobs.float() / temperature
    share = teacher.softmax(-1).nan_to_num(0.0) if temperature != 1.0 else teacher.exp()
    known = student.gather(1, tokens.long()) - student.logsumexp(-1, keepdim=True)
    loss = -(share * known).sum() * temperature**2
    if rest and temperature == 1.0:
        p, q = share, known.exp().masked_fill(logprobs == -torch.inf, 0.0)
        left = [1 - part.sum(-1) for part in (p, q)]
        loss = loss - (left[0].clamp_min(0) * left[1].clamp_min(LEAST).log()).sum()
    return loss


def reverse_divergence(logits: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Return the summed KL(student ‖ teacher), arguments as those of `divergence`.

    All tokens that aren't among the teacher's likeliest count as one, of the probability that is
    left; so it is exact if all are known, and never more than the true one. (MiniLLM, arXiv
    2306.08543, minimises it over the student's own texts.)
    """
    student = logits.float().log_softmax(-1)  # [places, vocabulary]
    there = logprobs > -torch.inf
    q = student.gather(1, tokens.long()).masked_fill(~there, -torch.inf)
    p = logprobs.float()
    left = [(1 - part.exp().sum(-1, keepdim=True)).clamp_min(LEAST).log() for part in (q, p)]
    q, p = torch.cat((q, left[0]), 1), torch.cat((p, left[1]), 1)
    there = functional.pad(there, (0, 1), value=True)
    return (q.exp() * (q - p).where(there, 0.0)).sum()


LEAST = 1e-6
"""The least probability of all tokens together that aren't known, about what float32 can tell."""


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Tell whether logits are the last hidden states times the head's weight, and nothing else.

    Some models add a bias, scale them or cap them.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "weight") or not hasattr(model, model.base_model_prefix):
        return False  # a T5's two stacks aren't one model of their own
    training = model.training
    model.eval()  # dropout would tell them apart
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    logits = model(**given, use_cache=False).logits.float()
    hidden = getattr(model, model.base_model_prefix)(**given, use_cache=False)
    model.train(training)
    found = functional.linear(hidden.last_hidden_state, head.weight).float()
    return found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-3, atol=1e-4)


LOGITS = 2**24
"""As many logits are kept for their gradient; where there are more, they are made twice."""


def teaching_loss(
    model: Any,
    batch: dict[str, Tensor],
    *,
    aim: Aim | None = None,
    rows: Tensor | None = None,
    plain: bool = True,
) -> tuple[Tensor, int]:
    """Return the summed loss of a batch's logits, and how many places it has.

    `batch` holds `input_ids` and `attention_mask` [batch, time], for an encoder-decoder also
    `decoder_input_ids`, to which places belong then, and of the places that count:
    `places` [count, 2] (row, time), `tokens` and `logprobs` [count, k], and `said` [count], the
    text's own next tokens. With `rows`, only those rows of the output head are learned: `tokens`
    and `said` are numbers among them, -1 for others. `plain` is what `has_plain_head` says: else
    the model makes all of its logits. Memory: what the body keeps for its gradient, and the logits
    of 256 places or LOGITS of them; of all tokens, if the head isn't plain.
    """
    aim = aim or Aim()
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {"input_ids", "attention_mask", "decoder_input_ids"} & batch.keys()
    given = {name: batch[name] for name in names}
    places = batch["places"]
    lesson = [batch[name] for name in ("tokens", "logprobs", "said")]
    if not plain:
        logits = body(**given, use_cache=False).logits[places[:, 0], places[:, 1]]
        logits = logits if rows is None else logits[:, rows]
        return aim.loss(logits, *lesson), len(logits)
    hidden = getattr(body, body.base_model_prefix)(**given, use_cache=False).last_hidden_state
    picked = hidden[places[:, 0], places[:, 1]]  # [count, hidden]
    head = body.get_output_embeddings().weight
    head = head if rows is None else head[rows]

    def part_of_loss(states: Tensor, head: Tensor, *lesson: Tensor) -> Tensor:
        return aim.loss(functional.linear(states, head), *lesson)

    if len(picked) * len(head) <= LOGITS:
        return part_of_loss(picked, head, *lesson), len(picked)
    total = picked.new_zeros((), dtype=torch.float32)
    for low in range(0, len(picked), 256):  # logits are made again for their gradient
        part = slice(low, low + 256)
        taught = [values[part] for values in lesson]
        found = checkpoint(part_of_loss, picked[part], head, *taught, use_reentrant=False)
        total = total + found
    return total, len(picked)
