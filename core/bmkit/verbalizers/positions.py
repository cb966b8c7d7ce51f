"""A model's logits where they are needed, and only there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bmkit.errors import InputError

MOST_LOGITS = 2**26
"""How many logits are in memory at a time: 256 MB in float32."""


def most_reads(model: Any) -> int:
    """Return at how many positions a model's logits may be in memory."""
    return max(1, MOST_LOGITS // vocabulary(model))


def vocabulary(model: Any) -> int:
    """Return how many tokens a model knows."""
    return int(inner(model).config.get_text_config().vocab_size)


def inner(model: Any) -> Any:
    """Return the transformers model, which PEFT may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits_at(
    model: Any, inputs: Mapping[str, Any], width: int, rows: Tensor, columns: Tensor
) -> Tensor:
    """Return the logits [n, vocabulary] at `rows` [n] and `columns` [n] of a model's input.

    `width` is the number of columns; what PEFT puts in front of them isn't counted. The head is run
    at these positions alone, and all that the model does behind it as well (a scale, a cap, a
    bias).
    """
    head = getattr(inner(model), "get_output_embeddings", lambda: None)()
    picked: list[int] = []

    def pick(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden = given[0]
        if hidden.dim() != 3:
            return None
        picked.append(len(rows))
        return (hidden[rows, columns + hidden.shape[1] - width][None], *given[1:])

    handle = head.register_forward_pre_hook(pick) if isinstance(head, nn.Module) else None
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    if picked:
        return logits[0]
    return logits[rows, columns + logits.shape[1] - width]


def states_at(
    model: Any, inputs: Mapping[str, Any], width: int, rows: Tensor, columns: Tensor
) -> Tensor:
    """Return what the head reads, [n, hidden_size], at places given as for `logits_at`.

    Raises InputError for a model without a head of one layer.
    """
    head = getattr(inner(model), "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise InputError("the model has no head that says words, whose states could be read")
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        logits_at(model, inputs, width, rows, columns)
    finally:
        handle.remove()
    (hidden,) = seen
    return hidden[rows, columns + hidden.shape[1] - width]


def logits_of_states(model: Any, inputs: Mapping[str, Any], states: Tensor) -> Tensor:
    """Return the logits [n, vocabulary] of `states` [n, hidden_size], as `states_at` returns them.

    They go through the head, and through what the model does behind it, in the place of what it
    makes of `inputs`, a row of any tokens. Raises InputError as `states_at` does.
    """
    head = getattr(inner(model), "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise InputError("the model has no head that says words, whose states could be read")

    def put(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states.to(given[0].device, given[0].dtype)[None], *given[1:])

    handle = head.register_forward_pre_hook(put)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return logits[0]


def logprobs(logits: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of `tokens` [m], each in row `places` [m] of `logits`."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits[places, tokens] - logits.logsumexp(-1)[places]


def batches(
    lengths: Sequence[int], reads: Sequence[int], batch_tokens: int, most_reads: int
) -> Iterator[list[int]]:
    """Yield the numbers of what goes together, the longest first.

    A batch has `batch_tokens` with its padding and `most_reads` reads at most, or is one alone.
    """
    batch: list[int] = []
    longest = total = 0
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        size = max(longest, lengths[number]) * (len(batch) + 1)
        if batch and (size > batch_tokens or total + reads[number] > most_reads):
            yield batch
            batch, longest, total = [], 0, 0
        batch.append(number)
        longest, total = max(longest, lengths[number]), total + reads[number]
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return rows as tokens and mask [rows, longest], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


def pad_of(model: Any) -> int:
    """Return a token to pad with, which nothing looks at."""
    pad = getattr(inner(model).config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0
