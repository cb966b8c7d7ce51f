"""How likely a text is: log-probabilities of its tokens, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from bmkit.deltas import plugged
from bmkit.errors import InputError
from bmkit.nn import products
from bmkit.runtime.budget import SCORE_BYTES


def at_once(vocabulary: int) -> int:
    """Return of how many tokens the logits are in memory at a time."""
    return max(1, min(64, SCORE_BYTES // (4 * max(vocabulary, 1))))


@dataclass(frozen=True)
class Scored:
    """One row, and the log-probability (natural) of each token that counts."""

    streamed: ClassVar = False
    """Whether its text was written while it was made."""

    id: Any
    prompt: str
    token_ids: list[int]
    logprobs: list[float]
    seconds: float

    @property
    def logprob(self) -> float:
        """Return the log-likelihood of the whole."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log-likelihood."""
        return math.exp(min(-self.logprob / max(len(self.logprobs), 1), 700.0))

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "token_ids": self.token_ids,
            "token_logprobs": [round(p, 6) for p in self.logprobs],
            "logprob": round(self.logprob, 6),
            "perplexity": round(self.perplexity, 6),
            "tokens": len(self.logprobs),
            "seconds": round(self.seconds, 4),
        }

    def line(self) -> str:
        """Return what is printed as text."""
        return (
            f"perplexity {self.perplexity:.4f}, log-likelihood {self.logprob:.4f}, "
            f"{len(self.logprobs)} tokens"
        )


def windows(count: int, scored: int, context: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, end): tokens from `first` on are scored, seeing those from `start` on.

    A text longer than the context is scored in windows that overlap by half, so that every token
    but the first ones sees at least half a context.
    """
    first = count - scored
    if context is None or count <= context:
        yield 0, first, count
        return
    end = 0
    while end < count:
        end = min(max(first + 1, context), count) if end == 0 else min(end + context // 2, count)
        start = max(0, end - context)
        yield start, max(first, start + 1), end
        first = end


@torch.inference_mode()
def score(model: Any, ids: list[int], scored: int, context: int | None) -> list[float]:
    """Return the log-probabilities of the last `scored` of `ids`, in transformers' own code.

    A decoder reads a few tokens at a time into its cache, so that their logits take little memory.
    An encoder-decoder reads what isn't scored into its encoder.
    """
    if model.config.is_encoder_decoder:
        return _encoder_decoder(model, ids, scored)
    found: list[float] = []
    chunk = at_once(model.config.get_text_config().vocab_size)
    front = plugged.in_front(model)
    whole = bool(getattr(model, "_is_stateful", False)) or front is not None
    for start, first, end in windows(len(ids), scored, context):
        part = torch.tensor([ids[start:end]], device=model.device)
        cache = None
        size = part.shape[1] if whole else chunk
        for low in range(0, part.shape[1], size):
            piece = part[:, low : low + size]
            with products.quick():
                out = model(input_ids=piece, past_key_values=cache, use_cache=not whole)
            cache = getattr(out, "past_key_values", None)
            at = start + low  # logits at token i are about token i + 1
            wanted = [i for i in range(at, at + piece.shape[1]) if first <= i + 1 < end]
            if wanted:
                rows = torch.tensor([i - at for i in wanted], device=model.device)
                logits = out.logits[:, out.logits.shape[1] - piece.shape[1] :]
                found += picked(logits[0, rows], [ids[i + 1] for i in wanted])
    return found


def _encoder_decoder(model: Any, ids: list[int], scored: int) -> list[float]:
    labels = torch.tensor([ids[len(ids) - scored :]], device=model.device)
    pad = model.config.pad_token_id or 0
    read = torch.tensor([ids[: len(ids) - scored] or [pad]], device=model.device)
    begin = model.generation_config.decoder_start_token_id
    if begin is None:
        begin = pad
    shifted = torch.cat((labels.new_tensor([[begin]]), labels[:, :-1]), 1)
    said = model.get_encoder()(input_ids=read)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    found: list[float] = []
    chunk = at_once(model.config.get_text_config().vocab_size)
    for low in range(0, scored, chunk):
        with products.quick():
            out = model(
                encoder_outputs=said,
                decoder_input_ids=shifted[:, low : low + chunk],
                past_key_values=cache,
                use_cache=True,
            )
        found += picked(out.logits[0], labels[0, low : low + chunk].tolist())
    return found


def picked(logits: Tensor, ids: list[int]) -> list[float]:
    """Return the log-probability of each of `ids` by its row of `logits` [tokens, vocabulary].

    Raises InputError if the logits are no numbers.
    """
    logits = logits.float()
    chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
    found = chosen - logits.logsumexp(-1)
    if not found.isfinite().all():
        raise InputError("the model's output is not a number; its weights are damaged")
    return [float(p) for p in found]


def packed(decoder: Any, ids: list[int], scored: int, context: int | None) -> list[float]:
    """Do as `score` does on the CPU's packed decoder."""
    found: list[float] = []
    for start, first, end in windows(len(ids), scored, context):
        part = ids[start:end]
        cache = decoder.cache(1, -(-len(part) // 64) * 64)
        for low, logits in decoder.all_logits(cache, 0, part, at_once(decoder.vocabulary)):
            at = start + low
            wanted = [i for i in range(at, at + len(logits)) if first <= i + 1 < end]
            if wanted:
                rows = torch.from_numpy(logits)[[i - at for i in wanted]]
                found += picked(rows, [ids[i + 1] for i in wanted])
    return found
