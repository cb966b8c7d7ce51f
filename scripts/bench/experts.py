"""Decoding with a share of the experts against the dense decoder: tokens a second, in turns.

python scripts/bench/experts.py     (random weights, made on the spot; some 3 minutes)
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import machine
import numpy as np
import torch
from transformers import LlamaConfig

from bmkit.runtime.cpu.decoder import Decoder
from bmkit.runtime.cpu.dots import BFLOAT16, INT8
from bmkit.runtime.cpu.experts import E_CHOSEN
from bmkit.runtime.cpu.pack import Packed, Shape, pack_floats
from bmkit.runtime.cpu.source import Fetched
from bmkit.runtime.experts import Experts, Router

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "2048x8192, 4 blocks": {
        "vocab_size": 8192,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
KINDS = {"int8": INT8, "bfloat16": BFLOAT16}
SHARES = (0.25, 0.5, 0.75)
SHARED = 0.0625
"""Of the experts, those that are always computed; they count as active."""
TOKENS = 24
"""What is decoded at a time, behind as many that were read before."""


def source_of(config: Any, kind: int) -> Fetched:
    """Return random weights, as they would be stored."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    sizes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    sizes |= {"o_proj": (hidden, hidden), "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    sizes |= {"down_proj": (hidden, inner), "embed_tokens": (config.vocab_size, hidden)}

    def fetch(name: str) -> Packed | None:
        last = name.rpartition(".")[2]
        if last in {"q_norm", "k_norm"}:
            return None
        if last not in sizes:
            return pack_floats(torch.ones(1, hidden))
        rows, inputs = sizes[last]
        values = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, generator=generator)
        if kind == INT8:
            scales = np.full((rows, 1), inputs**-0.5 / 74, np.float32)
            return Packed(Shape(INT8, rows, inputs), values.view(torch.uint8).numpy(), scales)
        return pack_floats(values.bfloat16() * (inputs**-0.5 / 74))

    return Fetched(fetch)


def experts_of(config: Any, size: int) -> Experts:
    """Return random routers of one layer."""
    generator = torch.Generator().manual_seed(1)
    whole = config.intermediate_size // size
    shared = int(SHARED * whole)

    def router() -> Router:
        weight = torch.randn(whole - shared, config.hidden_size, generator=generator)
        return Router(weight, torch.zeros(whole - shared))

    blocks = config.num_hidden_layers
    return Experts(size, shared, (1,) * blocks, tuple(router() for _ in range(blocks)))


def choose(decoder: Decoder, share: float) -> None:
    """Let a share of all experts be computed from now on."""
    assert decoder.divided is not None  # it was made so
    experts = decoder.divided.experts
    for each in decoder.divided.blocks.values():
        whole = experts.shared + each.router.experts
        each.numbers[E_CHOSEN] = round(share * whole) - experts.shared


def seconds_a_token(decoder: Decoder, cache: Any, ids: list[int]) -> float:
    """Decode `ids` one after the other, from the same place each time."""
    before = int(cache.done[0])
    start = time.perf_counter()
    for token in ids:
        decoder.step(cache, [token])
        cache.done[0] += 1
    found = (time.perf_counter() - start) / len(ids)
    cache.done[0] = before
    return found


def measure(config: Any, kind: int, size: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return medians of `rounds` in which each way decodes the same tokens."""
    source = source_of(config, kind)
    dense = Decoder(config, source, threads=threads)
    divided = Decoder(config, source, threads=threads, experts=experts_of(config, size))
    ids = torch.randint(0, config.vocab_size, (2 * TOKENS,)).tolist()
    caches = []
    for decoder in (dense, divided):
        caches.append(decoder.cache(1, 2 * TOKENS))
        if decoder.divided is not None:
            choose(decoder, 0.25)
        decoder.chain(caches[-1], 0, ids[:TOKENS])
    times: dict[str, list[float]] = {"dense": [], **{str(share): [] for share in SHARES}}
    for _ in range(rounds):
        times["dense"].append(seconds_a_token(dense, caches[0], ids[TOKENS:]))
        for share in SHARES:
            choose(divided, share)
            times[str(share)].append(seconds_a_token(divided, caches[1], ids[TOKENS:]))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "tokens_per_second": {name: round(1 / found, 2) for name, found in medians.items()},
        "times_dense": {
            str(share): round(medians["dense"] / medians[str(share)], 3) for share in SHARES
        },
        "spread": {n: round((max(f) - min(f)) / medians[n], 3) for n, f in times.items()},
    }


def main() -> None:
    """Measure every shape, kind and size; write results/experts.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--size", type=int, action="append")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    facts = machine.facts()
    results: dict[str, Any] = {}
    for name in given.shape or SHAPES:
        config = LlamaConfig(**SHAPES[name], tie_word_embeddings=True)
        for kind, number in KINDS.items():
            for size in given.size or (16, 32):
                found = measure(config, number, size, given.rounds, given.threads)
                results[f"{name}, {kind}, experts of {size}"] = found
                if given.dry:
                    print(name, kind, size, found, flush=True)
    about = {"tokens": TOKENS, "rounds": given.rounds, "threads": given.threads, "shared": SHARED}
    if not given.dry:
        machine.save("experts", {**facts, **about, "decoding": results})


if __name__ == "__main__":
    main()
