"""How likely a model takes each of several texts to be where a prompt has its mask.

The log-probabilities are those of one pass a row and choice, with far fewer tokens: what choices
share is computed once, rows of like length go together, and the head runs only where it is asked.
Prompts are lists of tokens without padding. Gradients flow where torch's mode lets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmkit.errors import InputError, RecipeError
from bmkit.model import context
from bmkit.prompting.encode import Encoded, Kind
from bmkit.verbalizers import halves, packed, pseudo, unpadded
from bmkit.verbalizers.continuations import Trie, tries
from bmkit.verbalizers.positions import inner, most_reads, vocabulary
from bmkit.verbalizers.pseudo import Order

Choice = Sequence[int]
Choices = Sequence[Choice] | Sequence[Sequence[Choice]]
"""Tokens of each choice: for all rows alike, or for each row its own."""
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities (natural) of each row's choices, all [rows, choices].

    Where a row has fewer choices than another, `words` are -inf.
    """

    words: Tensor
    """Of a choice's tokens, summed."""
    behind: Tensor
    """Of the tokens behind the choice, given it, summed."""
    word_tokens: Tensor
    """How many tokens `words` has summed."""
    behind_tokens: Tensor

    @property
    def sums(self) -> Tensor:
        """Return the log-probabilities of choices and what is behind them."""
        return self.words + self.behind

    @property
    def means(self) -> Tensor:
        """Return the same by token."""
        return self.sums / (self.word_tokens + self.behind_tokens).clamp_min(1)


def score(
    model: Any,
    prompts: Sequence[Encoded],
    kind: Kind,
    choices: Choices,
    *,
    mask_token: int | None = None,
    order: Order = "confident",
    batch_tokens: int = BATCH_TOKENS,
    soft_start: int | None = None,
) -> Likelihoods:
    """Score the choices of encoded prompts, whose template has one mask; see the functions below.

    A causal prompt's text behind the mask is scored along. A masked one needs `mask_token`. Raises
    RecipeError for several masks.
    """
    if any(len(one.masks) != 1 for one in prompts):
        raise RecipeError(
            "the likelihood of words is that at one mask, and the template has several",
            hint="take words of one token each, or a template with one mask",
        )
    ids = [one.ids for one in prompts]
    if kind == "causal":
        behind = [one.behind for one in prompts]
        return causal(model, ids, choices, behind, batch_tokens=batch_tokens, soft_start=soft_start)
    if kind == "seq2seq":
        starts = [one.decoder_ids for one in prompts]
        return seq2seq(
            model, ids, starts, choices, batch_tokens=batch_tokens, soft_start=soft_start
        )
    if mask_token is None:
        raise RecipeError("a masked model fills in masks, and the tokenizer has none")
    masks = [one.masks[0] for one in prompts]
    return masked(
        model, ids, masks, choices, mask_token=mask_token, order=order, batch_tokens=batch_tokens
    )


def causal(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choices: Choices,
    behind: Sequence[Sequence[int]] | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    soft_start: int | None = None,
) -> Likelihoods:
    """Score what may come after each prompt in a causal model.

    `behind` are the tokens after each row's choice. Those from `soft_start` on (the vocabulary's
    size, if not given) are trained ones, which are read and not scored. A batch has `batch_tokens`
    at most, padding included, if one choice with its prompt fits. Raises InputError for a row
    without tokens before the choice, a choice without tokens, and what is longer than the context.
    """
    table = _table(choices, len(prompts), behind)
    for row, prompt in enumerate(prompts, 1):
        if not prompt:
            raise InputError(f"row {row}: nothing is before what is to be scored")
    branches = packed.takes(model)
    longest = max(map(len, prompts), default=0)
    grown = _grown(model, table, behind, max(batch_tokens - longest, 1), soft_start)
    # blocks that compute their activations again would fill a cache twice
    keeps = not (model.training and torch.is_grad_enabled())
    shared = _common(prompts) if branches and keeps else 0
    shared = shared if shared >= packed.LEAST_HEAD and len(grown) > 1 else 0
    lines, first = [], 0
    for row, trie in grown:
        own = prompts[row][shared:]
        _require_fits(model, row, len(prompts[row]) + trie.depth)
        if branches:
            lines.append(packed.packed(own, trie, first))
        else:
            lines += packed.apart(own, trie, first)
        first += len(trie.asked)
    reads = most_reads(model)
    run = unpadded if unpadded.takes(model) else packed
    slots, found = run.answers(model, lines, batch_tokens, reads, prompts[0][:shared])
    return _gathered(table, grown, slots, found)


def seq2seq(
    model: Any,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[Sequence[int]],
    choices: Choices,
    behind: Sequence[Sequence[int]] | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    soft_start: int | None = None,
) -> Likelihoods:
    """Score what a decoder may say behind `starts`, about the prompts that its encoder reads.

    The rest is as in `causal`; tokens of encoder and decoder count together.
    """
    table = _table(choices, len(prompts), behind)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True), 1):
        if not prompt or not start:
            raise InputError(f"row {row}: nothing is before what is to be scored")
    grown = _grown(model, table, behind, batch_tokens, soft_start)
    asked, first = [], 0
    for row, trie in grown:
        _require_fits(model, row, max(len(prompts[row]), len(starts[row]) + trie.depth))
        asked.append(halves.Asked(prompts[row], starts[row], trie, first))
        first += len(trie.asked)
    slots, found = halves.answers(model, asked, batch_tokens, most_reads(model))
    return _gathered(table, grown, slots, found)


def masked(
    model: Any,
    prompts: Sequence[Sequence[int]],
    masks: Sequence[int],
    choices: Choices,
    *,
    mask_token: int,
    order: Order = "confident",
    batch_tokens: int = BATCH_TOKENS,
) -> Likelihoods:
    """Score words in the place of the token at `masks` of each prompt; see `pseudo` for `order`.

    Raises InputError for a choice without tokens, and what is longer than the context.
    """
    table = _table(choices, len(prompts), None)
    width = max((len(own) for own in table), default=0)
    filling = pseudo.Filling(prompts, masks, mask_token, order)
    for row, own in enumerate(table):
        for number, word in enumerate(own):
            _require_fits(model, row, len(prompts[row]) + len(word) - 1)
            filling.add(row * width + number, row, word)
    cells, values = pseudo.answers(model, filling, batch_tokens, most_reads(model))
    return _summed(table, values, (cells, list(range(len(cells)))), ([], []))


def _table(
    choices: Choices, rows: int, behind: Sequence[Sequence[int]] | None
) -> list[Sequence[Choice]]:
    """Return the choices of each row. Raises InputError for one without tokens."""
    shared = bool(choices) and (not choices[0] or isinstance(choices[0][0], int))
    table: list[Any] = [choices] * rows if shared else list(choices)
    if len(table) != rows:
        raise ValueError(f"{len(table)} rows of choices for {rows} prompts")
    for row, own in enumerate(table):
        for number, choice in enumerate(own):
            if not choice and not (behind and behind[row]):
                raise InputError(f"row {row + 1}: choice {number + 1} has no tokens")
    return table


def _grown(
    model: Any,
    table: Sequence[Sequence[Choice]],
    behind: Sequence[Sequence[int]] | None,
    most_nodes: int,
    soft_start: int | None,
) -> list[tuple[int, Trie]]:
    """Return each row's choices as tries; rows with the same ones have the same tries."""
    known: dict[tuple[int, tuple[int, ...]], list[Trie]] = {}
    grown = []
    scored = vocabulary(model) if soft_start is None else soft_start
    for row, own in enumerate(table):
        after = tuple(behind[row]) if behind is not None else ()
        if (id(own), after) not in known:
            found = tries(
                own, after, scored=scored, most_nodes=most_nodes, most_reads=most_reads(model)
            )
            known[id(own), after] = list(found)
        grown += [(row, trie) for trie in known[id(own), after]]
    return grown


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, each with one of its own behind."""
    least, most = min(map(list, prompts)), max(map(list, prompts))
    end = min(map(len, prompts)) - 1
    return next((at for at in range(end) if least[at] != most[at]), end)


def _require_fits(model: Any, row: int, tokens: int) -> None:
    limit = context(inner(model).config.get_text_config())
    if limit is not None and tokens > limit:
        raise InputError(
            f"row {row + 1}: {tokens} tokens with its longest choice, and the model reads {limit}",
            hint="lower template.max_seq_length, or take shorter words",
        )


def _gathered(
    table: Sequence[Sequence[Choice]],
    grown: Sequence[tuple[int, Trie]],
    slots: Sequence[int],
    found: Tensor,
) -> Likelihoods:
    values = found[torch.tensor(slots).argsort().to(found.device)]
    width = max(map(len, table))
    words, behind = (list[int](), list[int]()), (list[int](), list[int]())
    first = 0
    for row, trie in grown:
        for part, held in ((words, trie.words), (behind, trie.behind)):
            for choice, asked in zip(trie.choices, held, strict=True):
                part[0].extend([row * width + choice] * len(asked))
                part[1].extend(first + ask for ask in asked)
        first += len(trie.asked)
    return _summed(table, values, words, behind)


def _summed(
    table: Sequence[Sequence[Choice]],
    values: Tensor,
    words: tuple[list[int], list[int]],
    behind: tuple[list[int], list[int]],
) -> Likelihoods:
    """Sum `values` by cell: `words` and `behind` are cells, and which value goes into each."""
    rows, width = len(table), max(map(len, table))
    device = values.device
    parts = []
    for cells, which in (words, behind):
        index = torch.tensor(cells, dtype=torch.long, device=device)
        total = values.new_zeros(rows * width).index_add(0, index, values[which])
        parts.append((total.view(rows, width), index.bincount(minlength=rows * width)))
    there = torch.zeros(rows, width, dtype=torch.bool)
    for row, own in enumerate(table):
        there[row, : len(own)] = True
    (word, word_tokens), (after, after_tokens) = parts
    return Likelihoods(
        word.masked_fill(~there.to(device), -torch.inf),
        after,
        word_tokens.view(rows, width),
        after_tokens.view(rows, width),
    )
