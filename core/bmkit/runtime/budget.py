"""Which units of a model are resident and which are streamed, from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bmkit import env
from bmkit.errors import ResourceError
from bmkit.plan import Headers, TensorHeader

SLACK_BYTES = 96 * 2**20
"""What libraries take while a model runs: threads' stacks, allocators' reserves, the tokenizer."""
CHUNK, SMALL_CHUNK = 512, 128
"""Tokens of a prompt that go through the blocks together, and under a budget that is tight."""
GROUP = {"int8": None, "int4": 64}
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Placement:
    """Where a model's units are, and what that takes."""

    resident: frozenset[int]
    units: tuple[int, ...]
    """Bytes of each unit: the blocks, then the parts of the head."""
    head_parts: int
    fixed_bytes: int
    """All but weights: caches, activations, scratch, slack."""
    slot_bytes: int
    tokens: int
    """Tokens of a sequence, prompt and answer, that the caches are planned for."""
    chunk: int = CHUNK

    @property
    def streamed_bytes(self) -> int:
        """Return the bytes that are read again for every token."""
        return sum(size for i, size in enumerate(self.units) if i not in self.resident)

    @property
    def peak_bytes(self) -> int:
        """Return the most memory that this takes, on top of what is loaded before the model."""
        kept = sum(self.units[i] for i in self.resident)
        return self.fixed_bytes + kept + self.slot_bytes


def place(
    headers: Headers,
    *,
    rows: int,
    tokens: int,
    budget: int | None,
    quant: str | None = None,
    besides: int = 0,
) -> Placement:
    """Decide what is resident, in `budget` bytes if given, for `rows` sequences of `tokens`.

    `besides` are bytes of adapters, always resident.

    Raises ResourceError, naming the smallest budget that works, if this one doesn't.
    """
    layers = int(headers.config["num_hidden_layers"])
    blocks = [0] * layers
    largest = 0
    for tensor in headers.tensors:
        parts = tensor.name.split(".")
        if parts[:2] == ["model", "layers"] and not tensor.name.endswith("_shape"):
            size = _bytes(tensor, headers, quant)
            blocks[int(parts[2])] += size
            largest = max(largest, size)
    head = _head_bytes(headers, quant)
    fixed = _fixed(headers, rows, tokens, CHUNK) + besides
    whole = Placement(frozenset(range(layers + 1)), (*blocks, head), 1, fixed + head, 0, tokens)
    if budget is None or whole.peak_bytes <= budget:
        return whole
    slot = max(blocks)
    head_parts = math.ceil(head / slot)
    units = (*blocks, *([math.ceil(head / head_parts)] * head_parts))
    fixed = _fixed(headers, rows, tokens, SMALL_CHUNK) + besides
    fixed += 3 * largest  # the first reading of a matrix goes through a copy that is looked at
    streamed = Placement(frozenset(), units, head_parts, fixed, 2 * slot, tokens, SMALL_CHUNK)
    if streamed.peak_bytes > budget:
        need = math.ceil(streamed.peak_bytes / 2**20)
        raise ResourceError(
            f"--cpu-memory {env.format_bytes(budget)} is too small: this needs {need} MiB",
            hint=f"the smallest that works is --cpu-memory {need}MiB"
            + ("; fewer rows at a time take less: -s batch_size=1" if rows > 1 else ""),
        )
    if quant is not None:
        raise ResourceError(
            f"--cpu-memory {env.format_bytes(budget)} is too small for --quant while loading",
            hint=f"write it to disk first: bmkit compress {quant} -m MODEL, and run that",
        )
    chosen = spread(units, budget - streamed.peak_bytes)
    return Placement(frozenset(chosen), units, head_parts, fixed, 2 * slot, tokens, SMALL_CHUNK)


def spread(sizes: tuple[int, ...], room: int) -> set[int]:
    """Choose units to keep in `room` bytes, evenly over the order of use.

    Streamed units so have resident ones between them, behind whose computing their reading hides.
    """
    for count in range(len(sizes), 0, -1):
        chosen = {i * len(sizes) // count for i in range(count)}
        if sum(sizes[i] for i in chosen) <= room:
            return chosen
    return set()


def _round_up(count: int) -> int:
    return -(-count // 32) * 32


def _bytes(tensor: TensorHeader, headers: Headers, quant: str | None) -> int:
    """Return what a tensor takes in a slab."""
    shape = tensor.shape
    if tensor.name.endswith("_packed"):
        inputs = _round_up(shape[1] * 32 // headers.packed_bits)
        return shape[0] * inputs * headers.packed_bits // 8 + 64
    if tensor.name.endswith("_scale") or len(shape) < 2:
        return 4 * tensor.numel + 64
    rows, inputs = shape[0], _round_up(shape[1])
    if quant is not None:
        groups = math.ceil(inputs / (GROUP[quant] or inputs)) * (2 if quant == "int4" else 1)
        return rows * (inputs * BITS[quant] // 8 + 4 * groups) + 128
    return rows * inputs * (2 if tensor.dtype == "BF16" else 4) + 64


def _head_bytes(headers: Headers, quant: str | None) -> int:
    tied = bool(headers.config.get("tie_word_embeddings", False))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    found = next((t for t in headers.tensors if t.name == name), None)
    return _bytes(found, headers, "int8" if quant else None) if found else 0


def _fixed(headers: Headers, rows: int, tokens: int, chunk: int) -> int:
    config = headers.config
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    dim = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads)
    inner = int(config["intermediate_size"])
    cache = 2 * 4 * int(config["num_hidden_layers"]) * kv * dim * rows * _ceil(tokens, 64)
    activations = 4 * chunk * (8 * hidden + 5 * inner + 8 * heads * dim)
    scratch = 4 * max(inner, heads * dim, hidden) * hidden
    logits = 3 * 4 * int(config["vocab_size"]) * (rows + 1)
    return cache + activations + scratch + logits + SLACK_BYTES


def _ceil(count: int, step: int) -> int:
    return -(-count // step) * step
