"""Choices that a decoder says about what an encoder has read.

The encoder runs once for a prompt, and so does the decoder over what is before the choices; its
cache, which holds the keys and values of the encoder's output as well, is shared by all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from bmkit.verbalizers.continuations import ROOT, Trie
from bmkit.verbalizers.packed import Line, apart, prompted, read
from bmkit.verbalizers.positions import batches, inner, logits_at, logprobs, pad_of, padded


class Asked(NamedTuple):
    """A prompt, what its decoder begins with, and what it may say then."""

    prompt: Sequence[int]
    start: Sequence[int]
    trie: Trie
    first: int
    """The slot of its first answer."""


def answers(
    model: Any, asked: Sequence[Asked], batch_tokens: int, most_reads: int
) -> tuple[list[int], Tensor]:
    """Return the slots of all that was asked for, and the log-probabilities [n] to put there."""
    slots: list[int] = []
    found: list[Tensor] = []
    alike: dict[int, list[Asked]] = {}
    for one in asked:  # what has no padding before it has the positions that it had alone
        alike.setdefault(0 if prompted(model) else len(one.start), []).append(one)
    for group in alike.values():
        if prompted(model):
            _whole(model, group, batch_tokens, most_reads, slots, found)
            continue
        lengths = [len(one.prompt) + len(one.start) for one in group]
        reads = [1] * len(group)
        for batch in batches(lengths, reads, batch_tokens, most_reads):
            part = [group[number] for number in batch]
            _part(model, part, batch_tokens, most_reads, slots, found)
    return slots, torch.cat(found)


def _part(
    model: Any,
    part: Sequence[Asked],
    batch_tokens: int,
    most_reads: int,
    slots: list[int],
    found: list[Tensor],
) -> None:
    """Answer prompts whose decoders begin with as many tokens."""
    device = model.device
    ids, mask = padded([one.prompt for one in part], pad_of(model), device)
    hidden = inner(model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    start = torch.tensor([list(one.start) for one in part], device=device)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    roots = [_of_root(one) for one in part]
    inputs = _inputs(hidden, mask, start, cache)
    rows, columns, places, tokens = read(roots, device)
    logits = logits_at(model, inputs, start.shape[1], rows, columns)
    slots += [slot for line in roots for slot in line.slots]
    found.append(logprobs(logits, places, tokens))
    below = [(row, line) for row, one in enumerate(part) for line in _below(one)]
    lengths = [len(line.ids) + ids.shape[1] + start.shape[1] for _, line in below]
    reads = [len(line.columns) for _, line in below]
    for batch in batches(lengths, reads, batch_tokens, most_reads):
        lines = [below[number][1] for number in batch]
        of = torch.tensor([below[number][0] for number in batch], device=device)
        said, _ = padded([line.ids for line in lines], pad_of(model), device)
        inputs = _inputs(hidden[of], mask[of], said, _rows_of(cache, of, start.shape[1]))
        rows, columns, places, tokens = read(lines, device)
        logits = logits_at(model, inputs, said.shape[1], rows, columns)
        slots += [slot for line in lines for slot in line.slots]
        found.append(logprobs(logits, places, tokens))


def _whole(
    model: Any,
    group: Sequence[Asked],
    batch_tokens: int,
    most_reads: int,
    slots: list[int],
    found: list[Tensor],
) -> None:
    """Answer prompts that PEFT puts something in front of: each path with its prompt."""
    lines = [(one, line) for one in group for line in apart(one.start, one.trie, one.first)]
    lengths = [len(one.prompt) + len(line.ids) for one, line in lines]
    for batch in batches(
        lengths, [len(line.columns) for _, line in lines], batch_tokens, most_reads
    ):
        part = [lines[number][1] for number in batch]
        ids, mask = padded([lines[n][0].prompt for n in batch], pad_of(model), model.device)
        said, there = padded([line.ids for line in part], pad_of(model), model.device)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": said}
        inputs["decoder_attention_mask"] = there
        rows, columns, places, tokens = read(part, model.device)
        slots += [slot for line in part for slot in line.slots]
        logits = logits_at(model, inputs, said.shape[1], rows, columns)
        found.append(logprobs(logits, places, tokens))


def _inputs(hidden: Tensor, mask: Tensor, said: Tensor, cache: Any) -> dict[str, Any]:
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=hidden),
        "attention_mask": mask,
        "decoder_input_ids": said,
        "past_key_values": cache,
        "use_cache": True,
    }


def _of_root(one: Asked) -> Line:
    """Return what is asked for right behind the decoder's start."""
    here = [
        (slot, token)
        for slot, (place, token) in enumerate(one.trie.asked)
        if one.trie.reads[place] == ROOT
    ]
    column = [len(one.start) - 1] if here else []
    asked = [(0, token) for _, token in here]
    return Line(list(one.start), 0, None, column, asked, [one.first + slot for slot, _ in here])


def _below(one: Asked) -> list[Line]:
    """Return the paths that are read behind the decoder's start."""
    lines = (_without_root(line) for line in apart([], one.trie, one.first) if line.ids)
    return [line for line in lines if line.columns]


def _without_root(line: Line) -> Line:
    """Return a line without what is read before its first token."""
    kept = [n for n, column in enumerate(line.columns) if column >= 0]
    places = {n: place for place, n in enumerate(kept)}
    here = [(s, *ask) for s, ask in zip(line.slots, line.asked, strict=True) if ask[0] in places]
    return Line(
        line.ids,
        0,
        None,
        [line.columns[n] for n in kept],
        [(places[n], token) for _, n, token in here],
        [slot for slot, _, _ in here],
    )


def _rows_of(cache: EncoderDecoderCache, rows: Tensor, length: int) -> EncoderDecoderCache:
    """Return a copy of some rows of a cache, repeatedly if they are named so."""
    halves = []
    for held in (cache.self_attention_cache, cache.cross_attention_cache):
        half = DynamicCache()
        for number, layer in enumerate(held.layers):
            half.update(layer.keys[rows], layer.values[rows], number)
        halves.append(half)
    return EncoderDecoderCache(*halves)
