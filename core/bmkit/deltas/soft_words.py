"""Trained rows next to words: which are nearest, and rows as words of a plain checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from bmkit.deltas import soft_rows
from bmkit.deltas.held import base_of
from bmkit.deltas.soft_rows import ROWS
from bmkit.errors import RecipeError

UNSAID = -1e4
"""The bias of a head for a token that it is not to say."""


@dataclass(frozen=True)
class Near:
    """A token near a row: its text, its id, and the cosine between the two."""

    word: str
    token: int
    cosine: float


@torch.no_grad()
def nearest(rows: Tensor, table: Tensor, tokenizer: Any, k: int = 5) -> list[list[Near]]:
    """Return the `k` tokens of `table` [vocabulary, width] nearest to each row [rows, width].

    Only tokens that the tokenizer has, special ones apart. Memory: some thousand rows of the table,
    and a number for each token and row.
    """
    own = nn.functional.normalize(rows.double(), dim=-1)
    parts = (table[low : low + ROWS].double() for low in range(0, len(table), ROWS))
    near = [nn.functional.normalize(part, dim=-1) @ own.T for part in parts]
    cosines = torch.cat(near).T  # [rows, vocabulary]
    known = torch.zeros(cosines.shape[1], dtype=torch.bool, device=cosines.device)
    ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    known[[token for token in ids if token < len(known)]] = True
    cosines = cosines.masked_fill(~known, -torch.inf)
    best, tokens = cosines.topk(min(k, int(known.sum())), dim=-1)
    return [
        [Near(tokenizer.decode([t]), t, c) for t, c in zip(ts, cs, strict=True)]
        for ts, cs in zip(tokens.tolist(), best.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Merged:
    """A plain model and tokenizer, which have the rows among their tokens."""

    model: Any
    tokenizer: Any
    token_ids: list[int]
    """Of the rows, in their order: an `Encoder` of it has `soft_start` at the first."""


@torch.no_grad()
def merged(model: Any, tokenizer: Any) -> Merged:
    """Make a model's rows tokens of its vocabulary, in place; the tokenizer is a copy.

    The logits of all other tokens stay. The new ones aren't to be said: generating suppresses
    them, and a head's bias, if it has one, is -10000 there. Raises InputError if there are no
    rows, RecipeError if there are deltas: `merge` them before.
    """
    base = base_of(model)
    if model is not base or base.__dict__.get("bmkit_deltas"):
        raise RecipeError("soft tokens: the model has deltas", hint="merge them first")
    soft = soft_rows.detach(base)
    rows = soft().detach()
    words, ids = _named(tokenizer, len(rows))
    if max(ids) >= soft.start:
        base.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    at = torch.tensor(ids, device=rows.device)
    head = base.get_output_embeddings()
    if head is not None:
        head.weight[at] = 0  # if it is tied, the rows are put there next
        if getattr(head, "bias", None) is not None:
            head.bias[at] = UNSAID
    for table in soft_rows.tables_of(base):
        table.weight[at] = rows.to(table.weight.dtype)
    generation = getattr(base, "generation_config", None)
    if generation is not None:
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *ids})
    return Merged(base, words, ids)


def _named(tokenizer: Any, count: int) -> tuple[Any, list[int]]:
    """Return a copy of the tokenizer with so many special tokens more, and their ids."""
    words, known = copy.deepcopy(tokenizer), tokenizer.get_vocab()
    names: Sequence[str] = [f"<soft_{number}>" for number in range(count)]
    if taken := [name for name in names if name in known]:
        raise RecipeError(f"soft tokens: the vocabulary has a token `{taken[0]}` already")
    added = [AddedToken(name, special=True, normalized=False) for name in names]
    words.add_tokens(added, special_tokens=True)
    return words, [int(i) for i in words.convert_tokens_to_ids(names)]
