"""Choices behind causal prompts: a prompt and the trie of its choices are one sequence.

Each token of the trie sees the prompt and what is above it, by a mask and positions of its own, so
that a prompt is computed once for all choices. What all prompts begin with is computed once for
all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bmkit.verbalizers.continuations import ROOT, Trie
from bmkit.verbalizers.positions import batches, logits_at, logprobs, pad_of, padded

ONE_MASK = (
    *("cohere", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite"),
    *("llama", "mistral", "mixtral", "olmo", "olmo2", "phi", "phi3", "qwen3_moe", "stablelm"),
    "starcoder2",
)
"""Model types whose layers all take one mask, that of a window if the config names one."""
MASK_BY_KIND = (
    *("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "ministral", "olmo3", "qwen2"),
    *("qwen2_moe", "qwen3", "smollm3"),
)
"""Model types that take a mask for each kind of layer."""
KINDS = ("full_attention", "sliding_attention")
LEAST_HEAD = 8
"""A shorter beginning isn't worth a cache."""


@dataclass(frozen=True)
class Line:
    """A sequence to run, and what is asked of it."""

    ids: list[int]
    prompt: int
    """How many of `ids` are the prompt; the others are the trie's nodes, or one of its paths."""
    trie: Trie | None
    """Whose nodes they are; None if they follow each other."""
    columns: list[int]
    """Where it is read."""
    asked: list[tuple[int, int]]
    """What is asked for: a number among `columns`, and a token."""
    slots: list[int]
    """Where the answers go."""

    @property
    def longest(self) -> int:
        """Return the number of tokens that follow each other."""
        return len(self.ids) if self.trie is None else self.prompt + self.trie.depth


def takes(model: Any) -> bool:
    """Tell whether a model reads masks and positions of a caller's, with nothing in front."""
    if prompted(model):
        return False
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ("other",))
    known = config.model_type in ONE_MASK
    known = known or (config.model_type in MASK_BY_KIND and kinds <= set(KINDS))
    return known and config._attn_implementation in ("sdpa", "eager")


def prompted(model: Any) -> bool:
    """Tell whether PEFT puts something in front of what a model reads."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def packed(prompt: Sequence[int], trie: Trie, first: int) -> Line:
    """Return a prompt and a trie as one line; answers go to slots from `first` on."""
    at = len(prompt)
    columns = [at - 1 if node == ROOT else at + node for node in trie.reads]
    slots = list(range(first, first + len(trie.asked)))
    return Line([*prompt, *trie.tokens], at, trie, columns, trie.asked, slots)


def apart(prompt: Sequence[int], trie: Trie, first: int) -> Iterator[Line]:
    """Yield a prompt with each path of a trie as a line of its own: any model reads that."""
    at, done = len(prompt), set[int]()
    for path in trie.paths():
        columns = {ROOT: at - 1, **{node: at + i for i, node in enumerate(path)}}
        reads = [n for n, node in enumerate(trie.reads) if node in columns and n not in done]
        if not reads:
            continue
        done |= set(reads)
        places = {n: place for place, n in enumerate(reads)}
        here = [(slot, *ask) for slot, ask in enumerate(trie.asked) if ask[0] in places]
        yield Line(
            [*prompt, *(trie.tokens[node] for node in path)],
            at,
            None,
            [columns[trie.reads[n]] for n in reads],
            [(places[n], token) for _, n, token in here],
            [first + slot for slot, _, _ in here],
        )


def answers(
    model: Any, lines: Sequence[Line], batch_tokens: int, most_reads: int, shared: Sequence[int]
) -> tuple[list[int], Tensor]:
    """Return the slots of all that was asked for, and the log-probabilities [n] to put there.

    `shared` are tokens before all lines, which must be `packed` if there are any.
    """
    head = Head(model, shared) if shared else None
    slots: list[int] = []
    found: list[Tensor] = []
    cost = [len(line.ids) + len(shared) for line in lines]
    reads = [len(line.columns) for line in lines]
    for batch in batches(cost, reads, batch_tokens, most_reads):
        part = [lines[number] for number in batch]
        slots += [slot for line in part for slot in line.slots]
        found.append(_answered(model, part, head))
    return slots, torch.cat(found)


def read(part: Sequence[Line], device: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is read of a batch [reads] x 2, and what is asked of that [asked] x 2."""
    rows = [row for row, line in enumerate(part) for _ in line.columns]
    columns = [column for line in part for column in line.columns]
    places, tokens, before = list[int](), list[int](), 0
    for line in part:
        places += [before + place for place, _ in line.asked]
        tokens += [token for _, token in line.asked]
        before += len(line.columns)
    rows_, columns_, places_, tokens_ = (
        torch.tensor(values, dtype=torch.long, device=device)
        for values in (rows, columns, places, tokens)
    )
    return rows_, columns_, places_, tokens_


class Head:
    """The keys and values of what all lines begin with."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        cache = DynamicCache()  # one without windows: the masks have them
        given = torch.tensor([list(ids)], device=model.device)
        none = torch.zeros(0, dtype=torch.long, device=model.device)
        inputs = {"input_ids": given, "past_key_values": cache, "use_cache": True}
        if len(ids) > 1:
            inputs["attention_mask"] = line_masks(
                model, torch.ones_like(given).cumsum(1) - 1, None, 0
            )
        logits_at(model, inputs, len(ids), none, none)
        self.length = len(ids)
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, rows: int) -> DynamicCache:
        """Return a cache of so many rows that all begin like this."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache


def _answered(model: Any, part: Sequence[Line], head: Head | None) -> Tensor:
    ids, mask = padded([line.ids for line in part], pad_of(model), model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    branches = any(line.trie is not None and line.trie.tokens for line in part)
    if branches or head is not None:
        before = head.length if head is not None else 0
        positions = line_positions(part, ids, before)
        inputs["attention_mask"] = line_masks(model, positions, part, before)
        inputs["position_ids"] = positions
    if head is not None:
        inputs |= {"past_key_values": head.cache(len(part)), "use_cache": True}
    rows, columns, places, tokens = read(part, model.device)
    return logprobs(logits_at(model, inputs, ids.shape[1], rows, columns), places, tokens)


def line_positions(part: Sequence[Line], ids: Tensor, before: int) -> Tensor:
    """Return the position of each token [lines, tokens]; `before` are in the cache."""
    positions = torch.arange(before, before + ids.shape[1]).repeat(len(part), 1)
    for row, line in enumerate(part):
        if line.trie is not None and line.trie.tokens:
            depths = torch.tensor(line.trie.depths) + before + line.prompt
            positions[row, line.prompt : len(line.ids)] = depths
        positions[row, len(line.ids) :] = 0
    return positions.to(ids.device)


def line_masks(model: Any, positions: Tensor, part: Sequence[Line] | None, before: int) -> Any:
    """Return the masks that a model takes: what is added to attention, [lines, 1, tokens, seen]."""
    config, device = model.config, positions.device
    sees = _sees(part, positions.shape, before, device)
    seen = torch.cat((torch.arange(before, device=device).expand(len(sees), -1), positions), 1)
    distance = positions[:, :, None] - seen[:, None, :]
    window = getattr(config, "sliding_window", None)
    near = sees if window is None else sees & (distance < window)
    least = torch.finfo(model.dtype).min

    def added(allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=model.dtype, device=device)
        return mask.masked_fill_(~allowed, least)[:, None]

    if config.model_type in ONE_MASK:
        return added(near)
    kinds = sorted(set(config.layer_types))
    return {kind: added(sees if kind == "full_attention" else near) for kind in kinds}


def _sees(part: Sequence[Line] | None, shape: torch.Size, before: int, device: Any) -> Tensor:
    """Return which tokens each one sees, [lines, tokens, seen]."""
    lines, width = shape
    sees = torch.ones(lines, width, before + width, dtype=torch.bool).tril(before)
    known: dict[int, Tensor] = {}
    for row, line in enumerate(part or ()):
        if line.trie is not None and line.trie.tokens:
            if id(line.trie) not in known:
                known[id(line.trie)] = _above(line.trie)
            start = before + line.prompt
            size = len(line.trie.tokens)
            sees[row, line.prompt : line.prompt + size, start : start + size] = known[id(line.trie)]
    return sees.to(device)


def _above(trie: Trie) -> Tensor:
    """Return which nodes are above each one, itself included, [nodes, nodes]."""
    above = torch.eye(len(trie.tokens), dtype=torch.bool)
    for node, parent in enumerate(trie.parents):
        if parent != ROOT:
            above[node] |= above[parent]
    return above
