"""Lines of a batch as one row of tokens, without padding, in the model's own code.

Layers see each token by itself but for attention, which is given the lines apart: so only there
are they padded to the longest. What all lines begin with is attended to from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.verbalizers import packed
from bmkit.verbalizers.packed import Line
from bmkit.verbalizers.positions import inner, logits_at, logprobs, padded

NAME = "bmkit_unpadded"
"""What transformers calls the attention below."""
KNOWN = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Model types whose attention is transformers' own, nothing more, and is told what lines it has."""
Memory = dict[int, tuple[Tensor, Tensor]]
"""Keys and values [1, heads, tokens, dim] of layers, by their numbers."""


@dataclass(frozen=True)
class Lines:
    """Where the tokens of lines are in one row of them."""

    lengths: Tensor
    before: Memory = field(default_factory=dict)
    """What all lines attend to besides their own tokens."""
    kept: Memory | None = None
    """Where keys and values go, if they are to be kept; then there is one line."""

    def apart(self, x: Tensor) -> Tensor:
        """Return x [1, heads, tokens, dim] as [lines, heads, longest, dim], zeros behind lines."""
        rows, columns = self.places
        found = x.new_zeros(len(self.lengths), int(self.lengths.max()), *x.shape[1::2])
        found[rows, columns] = x[0].transpose(0, 1)
        return found.transpose(1, 2)

    def together(self, x: Tensor) -> Tensor:
        """Return x [lines, heads, longest, dim] as [1, tokens, heads, dim]."""
        rows, columns = self.places
        return x.transpose(1, 2)[rows, columns][None]

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Return the line of each token, and its place in it."""
        rows = torch.repeat_interleave(self.lengths)
        starts = self.lengths.cumsum(0) - self.lengths
        return rows, torch.arange(len(rows), device=rows.device) - starts[rows]


def takes(model: Any) -> bool:
    """Tell whether a model can be run like this: on the CPU, where padding is what takes long."""
    base = inner(model)
    config = base.config
    return (
        config.model_type in KNOWN
        and config._attn_implementation == "sdpa"
        and base.device.type == "cpu"
        and not base.training
        and packed.takes(model)
    )


def answers(
    model: Any, lines: Sequence[Line], batch_tokens: int, most_reads: int, shared: Sequence[int]
) -> tuple[list[int], Tensor]:
    """Do as `packed.answers` does. A batch has `batch_tokens` without its padding."""
    slots: list[int] = []
    found: list[Tensor] = []
    with _attention(model):
        before = _memory(model, shared) if shared else {}
        for batch in _batches(lines, batch_tokens, most_reads):
            part = [lines[number] for number in batch]
            slots += [slot for line in part for slot in line.slots]
            found.append(_answered(model, part, before, len(shared)))
    return slots, torch.cat(found)


def _batches(lines: Sequence[Line], batch_tokens: int, most_reads: int) -> Iterator[list[int]]:
    """Yield the numbers of lines that go together, the longest first."""
    batch: list[int] = []
    tokens = reads = 0
    for number in sorted(range(len(lines)), key=lambda n: (-len(lines[n].ids), n)):
        size, asked = len(lines[number].ids), len(lines[number].columns)
        if batch and (tokens + size > batch_tokens or reads + asked > most_reads):
            yield batch
            batch, tokens, reads = [], 0, 0
        batch.append(number)
        tokens, reads = tokens + size, reads + asked
    if batch:
        yield batch


def _memory(model: Any, ids: Sequence[int]) -> Memory:
    """Return the keys and values of what all lines begin with."""
    kept: Memory = {}
    none = torch.zeros(0, dtype=torch.long)
    given = torch.tensor([list(ids)])
    lines = Lines(torch.tensor([len(ids)]), kept=kept)
    positions = torch.arange(len(ids))[None]
    masks = packed.line_masks(model, positions, None, 0) if _windowed(model, len(ids)) else None
    logits_at(model, _inputs(given, positions, masks, lines), len(ids), none, none)
    return kept


def _answered(model: Any, part: Sequence[Line], before: Memory, count: int) -> Tensor:
    ids, _ = padded([line.ids for line in part], 0, model.device)
    lines = Lines(torch.tensor([len(line.ids) for line in part]), before)
    positions = packed.line_positions(part, ids, count)
    branches = any(line.trie is not None and line.trie.tokens for line in part)
    own = branches or count or _windowed(model, ids.shape[1])
    masks = packed.line_masks(model, positions, part, count) if own else None
    there = lines.places
    row = ids[there][None]
    starts = lines.lengths.cumsum(0) - lines.lengths
    rows, columns, places, tokens = packed.read(part, model.device)
    inputs = _inputs(row, positions[there][None], masks, lines)
    at = starts[rows] + columns
    return logprobs(logits_at(model, inputs, row.shape[1], rows * 0, at), places, tokens)


def _inputs(ids: Tensor, positions: Tensor, masks: Any, lines: Lines) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": masks,
        "use_cache": False,
        "bmkit_lines": lines,
    }


def _windowed(model: Any, tokens: int) -> bool:
    """Tell whether some layers don't see all of so many tokens."""
    window = getattr(inner(model).config, "sliding_window", None)
    return window is not None and tokens > window


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    """Let the model attend by lines while the block runs."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    config = inner(model).config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    bmkit_lines: Lines,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within lines: query [1, heads, tokens, dim], as transformers calls it."""
    lines = bmkit_lines
    if lines.kept is not None:
        lines.kept[module.layer_idx] = (key, value)
    q, k, v = (lines.apart(x) for x in (query, key, value))
    if (before := lines.before.get(module.layer_idx)) is not None:
        k, v = (_behind(b, x) for b, x in zip(before, (k, v), strict=True))
    mixed = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return lines.together(mixed), None


def _behind(before: Tensor, x: Tensor) -> Tensor:
    """Return x [lines, heads, longest, dim] with `before` [1, heads, tokens, dim] in front."""
    return torch.cat((before.expand(len(x), -1, -1, -1), x), 2)
