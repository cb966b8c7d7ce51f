"""Generate answers for a batch of tokenised prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from bmkit.runtime import sampling
from bmkit.runtime.stream import TextStream, cut_at, visible

EVERY = "*"
"""Instead of one adapter's name: all of them."""


@dataclass(frozen=True)
class Generation:
    """How to choose tokens and when to stop."""

    max_new_tokens: int
    sampled: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of GenerationConfig that say what may be chosen: see `sampling.limits`."""
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    """Of how many likeliest tokens to tell the log-probability, beside the chosen one's."""


@dataclass(frozen=True)
class Answer:
    """What the model has said to one prompt."""

    text: str
    token_ids: list[int]
    finish: str  # "eos", "stop" or "length"
    seconds: float
    logprobs: list[sampling.Chosen] | None = None
    """What the model itself thought of each token, before penalties and temperature."""


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    how: Generation,
    *,
    numbers: Sequence[int],
    write: Callable[[str], None] | None = None,
    chunk: int | None = None,
    static: bool = False,
    more: Mapping[str, Any] | None = None,
) -> list[Answer]:
    """Answer `prompts` (token ids, not empty) in one batch, padded on the left.

    `numbers` are the prompts' numbers in the run: with the seed they decide each one's draws, so
    that batching changes no draw. `write` gets the text of a single prompt while it is made.
    Memory grows with the batch's longest prompt plus `max_new_tokens`; with `chunk`, a decoder
    reads so many tokens of the prompts at a time; `static` fixes the cache's size, and lets
    transformers compile the decode step where it can. `more` goes to transformers' `generate`.
    """
    eos = eos_ids(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos or [0])[0]
    longest = max(map(len, prompts))
    encoder = bool(model.config.is_encoder_decoder)  # it counts positions from the left
    start = 1 if encoder else longest
    ids = _padded(prompts, pad, left=not encoder).to(model.device)
    mask = _padded([[1] * len(p) for p in prompts], 0, left=not encoder).to(model.device)
    options: dict[str, Any] = {
        "max_new_tokens": how.max_new_tokens,
        "do_sample": False,
        "eos_token_id": eos or None,
        "pad_token_id": pad,
        "use_cache": True,
        **(more or {}),
    }
    steps = LogitsProcessorList()
    said = sampling.Told(how.logprobs) if how.logprobs is not None else None
    if said is not None:
        steps.append(said)
    padding = [0 if encoder else longest - len(p) for p in prompts]
    steps += choices(how, numbers, padding=padding, start=start, eos=eos, device=model.device)
    options["logits_processor"] = steps
    if how.stop_strings:
        stop = StopStrings(tokenizer, how.stop_strings, start)
        options["stopping_criteria"] = StoppingCriteriaList([stop])
    if write is not None and len(prompts) == 1:
        options["streamer"] = TextStream(tokenizer, how.stop_strings, write)
    if chunk is not None and not encoder and longest > chunk:
        options["prefill_chunk_size"] = chunk
    if static:
        options["cache_implementation"] = "static"
    begun = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=mask, **options)
    seconds = time.perf_counter() - begun
    rows = out[:, start:].tolist()
    answers = [_answer(row, tokenizer, eos, how, seconds) for row in rows]
    if said is None:
        return answers
    told = said.chosen(out[:, start:])
    return [replace(a, logprobs=t[: len(a.token_ids)]) for a, t in zip(answers, told, strict=True)]


def choices(
    how: Generation,
    numbers: Sequence[int],
    *,
    padding: Sequence[int],
    start: int,
    eos: Sequence[int],
    device: torch.device | str = "cpu",
    most: int | None = None,
) -> LogitsProcessorList:
    """Return what turns scores into choices: the largest of what comes out is the next token.

    `padding` are the tokens before each row's own, `start` is where answers begin. A row's draws
    depend on the seed and its number. `most` is how long prompt and answer can be.
    """
    steps = LogitsProcessorList()
    if how.repetition_penalty != 1.0:
        steps.append(sampling.RepetitionPenalty(how.repetition_penalty, padding))
    steps += sampling.limits(how.more, start=start, eos=eos, device=device, most=most)
    if how.sampled:
        steps += sampling.processors(
            [sampling.row_seed(how.seed, n) for n in numbers],
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
            typical_p=how.more.get("typical_p", 1.0),
            epsilon_cutoff=how.more.get("epsilon_cutoff", 0.0),
            eta_cutoff=how.more.get("eta_cutoff", 0.0),
            start=start,
        )
    return steps


def _padded(rows: Sequence[list[int]], pad: int, *, left: bool) -> Tensor:
    longest = max(map(len, rows))
    fill = [[pad] * (longest - len(row)) for row in rows]
    whole = [f + r if left else r + f for r, f in zip(rows, fill, strict=True)]
    return torch.tensor(whole)


def eos_ids(config: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: a GenerationConfig's, and the tokenizer's."""
    found = getattr(config, "eos_token_id", None)
    ids = [] if found is None else [found] if isinstance(found, int) else list(found)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def plain_defaults(model: Any) -> None:
    """Drop what a checkpoint's generation_config.json prefers: the recipe alone decides."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
        forced_bos_token_id=getattr(own, "forced_bos_token_id", None),
        forced_eos_token_id=getattr(own, "forced_eos_token_id", None),
    )


def _answer(
    row: list[int], tokenizer: Any, eos: Sequence[int], how: Generation, seconds: float
) -> Answer:
    end = next((i + 1 for i, token in enumerate(row) if token in eos), None)
    ids = row[:end]
    text, stopped = visible(ids, tokenizer, how.stop_strings)
    if stopped is not None:  # what follows is padding, in a batch
        return Answer(text, ids[:stopped], "stop", seconds)
    return Answer(text, ids, "length" if end is None else "eos", seconds)


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """End a row when what it has generated holds a stop string.

    Only new tokens count: the end of a prompt can't stop its answer.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop_strings, self.start = tokenizer, stop_strings, start
        # A token may hold as little as one of a character's four bytes.
        self.window = 4 * max(map(len, stop_strings)) + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Tell for each row of `input_ids` [batch, time] whether it is done."""
        tail = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :].tolist()
        done = []
        for ids in tail:
            texts = (self.tokenizer.decode(ids, skip_special_tokens=s) for s in (True, False))
            done.append(any(cut_at(text, self.stop_strings) != text for text in texts))
        return torch.tensor(done, device=input_ids.device)
