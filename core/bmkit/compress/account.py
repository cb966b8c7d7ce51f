"""What a checkpoint is: its size, its work for a token, what it says of text, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bmkit import model, packed, plan
from bmkit.nn import feed_forward, walk
from bmkit.runtime import experts
from bmkit.runtime.cpu import pack
from bmkit.runtime.cpu.source import Files
from bmkit.runtime.voice import Voice

PROMPT = 256
"""Tokens that reading is timed on, at most."""
SAID = 32
"""Tokens that speaking is timed on."""
ROUNDS = 3


@dataclass(frozen=True)
class Account:
    """One line of the table: a checkpoint after a step."""

    step: str
    bytes: int
    """Of all weights on disk."""
    parameters: int
    nonzeros: int
    flops_per_token: int
    """Two for each weight that a token is multiplied with; attention over a context is left out."""
    perplexity: float | None = None
    decode: float | None = None
    """Tokens a second, one row, as `infer` computes."""
    prefill: float | None = None
    """Tokens of a prompt a second."""

    def row(self) -> dict[str, float | int | str]:
        """Return what is known, as it is written down."""
        return {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None
        }


def size(path: Path) -> tuple[int, int, int]:
    """Return bytes on disk, weights, and weights that aren't zero.

    Memory: one matrix, unpacked; for the formats of other libraries all of them.
    """
    headers = plan.read_headers(path)
    quantization = headers.config.get("quantization_config") or {}
    if quantization.get("quant_method") in plan.FOREIGN:
        dense = packed.unpacked(headers, dict(model.tensors(headers)), model.empty_model(path))
        counts = [(t.numel(), int(torch.count_nonzero(t))) for t in dense.values()]
        return headers.bytes, sum(n for n, _ in counts), sum(n for _, n in counts)
    files = Files(path)
    ends = (".weight_packed", ".weight_kept")
    names = {t.name.rpartition(".")[0] for t in headers.tensors if t.name.endswith(ends)}
    beside = (*ends, "weight_places", "weight_scale", "weight_shape", "zero_point", "input_scale")
    parameters = nonzeros = 0
    try:
        for name in sorted(names):
            matrix = files.packed(name)
            values = pack.integers(matrix)
            assert matrix.scales is not None  # integers have them
            _, zero = pack.scales_and_zeros(matrix.scales, matrix.shape.kind)
            middle = (
                np.int8(0) if zero is None else np.repeat(zero, values.shape[1] // zero.shape[1], 1)
            )
            parameters += values.size
            nonzeros += int(np.count_nonzero(values != middle))
        for name, tensor in model.tensors(headers):
            if not name.endswith(beside):
                parameters += tensor.numel()
                nonzeros += int(torch.count_nonzero(tensor))
    finally:
        files.close()
    return headers.bytes, parameters, nonzeros


def flops_per_token(path: Path) -> int:
    """Return twice the weights that each token is multiplied with: linear layers and the head."""
    skeleton: Any = model.empty_model(path)
    config = skeleton.config.get_text_config()
    count = sum(m.in_features * m.out_features for m in walk.linears(skeleton).values())
    for name, parameter in skeleton.named_parameters():
        module = skeleton.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 3:  # experts: each token goes through some
            some = getattr(config, "num_experts_per_tok", None) or len(parameter)
            count += parameter.numel() * min(some, len(parameter)) // len(parameter)
        elif parameter.ndim == 2 and not isinstance(module, nn.Linear | nn.Embedding):
            count += parameter.numel()
    if (divided := experts.read(path)) is not None:
        count -= _left_out(skeleton, divided)
    head = getattr(skeleton, "get_output_embeddings", lambda: None)()
    if head is not None:
        count += head.weight.numel()
    return 2 * count


def _left_out(skeleton: Any, divided: experts.Experts) -> int:
    """Return the weights of experts that a token doesn't compute, less those of routers."""
    name, _ = walk.stack(skeleton)
    left = 0
    for block, chosen, router in zip(
        skeleton.get_submodule(name), divided.chosen, divided.routers, strict=True
    ):
        found = feed_forward.find(block)
        if router is None or found is None:
            continue
        neurons = found.width - divided.size * (divided.shared + chosen)
        left += neurons * found.hidden * (len(found.rows) + 1)
        parts = (router.weight, router.inner_weight)
        left -= sum(part.numel() for part in parts if part is not None)
    return left


def speed(voice: Voice, ids: Sequence[int]) -> tuple[float, float]:
    """Return tokens a second, spoken and read: medians of a few rounds, after one that warms up."""
    prompt = list(ids[:PROMPT])
    run = _fused(voice.decoder) if voice.decoder is not None else _plain(voice.model)
    found = [run(prompt) for _ in range(ROUNDS + 1)][1:]
    reading, speaking = (statistics.median(times) for times in zip(*found, strict=True))
    return SAID / speaking, len(prompt) / reading


def _fused(decoder: Any) -> Callable[[list[int]], tuple[float, float]]:
    def run(prompt: list[int]) -> tuple[float, float]:
        cache = decoder.cache(1, -(-(len(prompt) + SAID) // 64) * 64)
        start = time.perf_counter()
        logits = decoder.chain(cache, 0, prompt)
        read = time.perf_counter()
        for _ in range(SAID):
            logits = decoder.step(cache, [int(logits[0].argmax())])
            cache.done[0] += 1
        return read - start, time.perf_counter() - read

    return run


def _plain(whole: Any) -> Callable[[list[int]], tuple[float, float]]:
    def wait() -> float:
        if whole.device.type == "cuda":
            torch.cuda.synchronize(whole.device)
        return time.perf_counter()

    @torch.inference_mode()
    def run(prompt: list[int]) -> tuple[float, float]:
        ids = torch.tensor([prompt], device=whole.device)
        start = wait()
        found = whole(input_ids=ids, use_cache=True)
        token = found.logits[:, -1:].argmax(-1)
        read = wait()
        for _ in range(SAID):
            found = whole(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
            token = found.logits[:, -1:].argmax(-1)
        return read - start, wait() - read

    return run
