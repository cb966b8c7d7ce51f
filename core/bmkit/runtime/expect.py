"""How fast generating should be, from a placement and from what this machine reads in a moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmkit.artifact import EXPERTS
from bmkit.errors import InputError
from bmkit.plan import Headers
from bmkit.runtime.budget import Placement, Sizes
from bmkit.runtime.choose import Chosen

SAMPLE_BYTES = 64 * 2**20
BLOCK_SECONDS = {"packed": 50e-6, "placed": 1e-3, "dense": 1e-3}
"""What a block costs besides its weights: its dispatch, its norms, its attention."""
EFFICIENCY = 0.6
"""Of the rate of a large matrix product, what a prompt's reading reaches."""


@dataclass(frozen=True)
class Rates:
    """What a machine does a second."""

    memory: float
    """Bytes of weights read where they are computed with."""
    link: float
    """Bytes brought there: from disk on the CPU, from RAM on a GPU."""
    flops: float


def rates(file: Path, *, device: str, threads: int | None) -> Rates:
    """Measure a machine, in half a second; `file` is a part of it as it is, cached or not."""
    return _on_gpu(device) if device.startswith("cuda") else _on_cpu(file, threads)


def expect(chosen: Chosen, headers: Headers, machine: Rates, *, width: int = 4) -> dict[str, float]:
    """Return tokens per second: of one answer's decoding, and of reading a prompt.

    `width` is the bytes of a weight that isn't packed.
    """
    sizes = Sizes.of(headers.config)
    numel = headers.dense_numel - _unused(headers) // max(_stored_width(headers), 1)
    place = chosen.placement
    if place is None:
        here, brought, chunk = numel * width, 0, 512
    else:
        brought, chunk = place.streamed_bytes, place.chunk
        here = max(sum(place.units) - brought - _unused(headers), 0)
        if chosen.way == "packed":
            here -= _passed_over(headers, place)
    fixed = sizes.layers * BLOCK_SECONDS[chosen.way]
    seconds = here / machine.memory + brought / machine.link + fixed
    tables = 2 if "lm_head.weight" in {t.name for t in headers.tensors} else 1
    inner = max(numel - tables * sizes.vocabulary * sizes.hidden, 1)  # the head is for one token
    computing = chunk * 2 * inner / (machine.flops * EFFICIENCY)
    reading = max(computing, brought / machine.link) + fixed
    return {
        "decode_tokens_per_second": round(1 / seconds, 2),
        "prefill_tokens_per_second": round(chunk / reading, 1),
    }


def _stored_width(headers: Headers) -> int:
    return round(headers.bytes / max(headers.dense_numel, 1))


def _unused(headers: Headers) -> int:
    """Return the bytes of experts that a token isn't sent to."""
    text = headers.config.get("text_config") or headers.config
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((int(text[n]) for n in names if text.get(n)), 0)
    chosen = int(text.get("num_experts_per_tok") or count)
    if not count:
        return 0
    total = sum(t.bytes for t in headers.tensors if ".experts." in t.name)
    return total * max(count - chosen, 0) // count


def _passed_over(headers: Headers, place: Placement) -> int:
    """Return the bytes of resident blocks that a token's choice of experts leaves out.

    Raises InputError if the file of experts is damaged.
    """
    file = headers.path / EXPERTS
    if not file.is_file():
        return 0
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            said = json.loads(stream.read(min(length, 2**26)))["__metadata__"]
        size, shared = int(said["size"]), int(said["shared"])
        counts = [int(n) for n in json.loads(said["chosen"])]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{file} is damaged: {exc}") from None
    inner = Sizes.of(headers.config).inner
    found = 0.0
    for i in place.resident.intersection(range(len(counts))):
        own = [t for t in headers.tensors if t.name.startswith(f"model.layers.{i}.")]
        neurons = sum(t.bytes for t in own if ".mlp." in t.name) / max(sum(t.bytes for t in own), 1)
        active = (shared + counts[i]) * size / inner if counts[i] >= 0 else 1.0
        found += place.units[i] * neurons * max(1 - active, 0.0)
    return int(found)


def _best(run: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)


def _on_cpu(file: Path, threads: int | None) -> Rates:
    count = threads or len(os.sched_getaffinity(0))
    parts = [np.ones(SAMPLE_BYTES // 4 // count, np.float32) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        memory = _best(lambda: list(pool.map(lambda x: np.dot(x, x), parts)))
    square = np.ones((768, 768), np.float32)
    size = min(SAMPLE_BYTES, file.stat().st_size)
    buffer = memoryview(bytearray(size))
    with file.open("rb", buffering=0) as stream:
        stream.seek((file.stat().st_size - size) // 2)
        link = _best(lambda: stream.readinto(buffer), 1)
    return Rates(SAMPLE_BYTES / memory, size / link, 2 * 768**3 / _best(lambda: square @ square, 4))


def _on_gpu(device: str) -> Rates:
    import torch

    there = torch.empty(2 * SAMPLE_BYTES, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    here = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
    square = torch.ones(4096, 4096, dtype=torch.float16, device=device)  # which all can

    def timed(run: Callable[[], object]) -> float:
        def whole() -> None:
            run()
            torch.cuda.synchronize(device)

        return _best(whole, 4)

    memory = 2 * len(there) / timed(lambda: other.copy_(there))
    link = SAMPLE_BYTES / timed(lambda: there[:SAMPLE_BYTES].copy_(here, non_blocking=True))
    return Rates(memory, link, 2 * 4096**3 / timed(lambda: square @ square))
