"""What compressing will need, from headers alone."""

from __future__ import annotations

from bmkit.compress.recipe import CompressRecipe
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers

SHARD_BYTES = 2 * 2**30


def estimate(job: Job) -> Estimate:
    """Say what `compress` will do to the model, and the memory and disk it takes."""
    recipe = job.recipe
    assert isinstance(recipe, CompressRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    step = recipe.steps[0]
    linear = quantizable(headers)
    packed = sum(t.numel * step.bits // 8 for t in linear)
    scales = sum(_scales(t.shape, step.group_size) * 4 for t in linear)
    kept = headers.bytes - sum(t.bytes for t in linear)
    written = kept + packed + scales
    largest = max((t.numel for t in headers.tensors), default=0)
    ram = RUNTIME_BYTES + min(written, SHARD_BYTES) + 4 * 4 * largest
    gpu = 4 * 4 * largest if recipe.device != "cpu" else 0
    group = "per output channel" if step.group_size == "channel" else f"per {step.group_size}"
    text = f"quantize {len(linear)} linear layers to {step.bits} bits, one scale {group}"
    return Estimate([text], Peak(ram_bytes=ram, gpu_bytes=gpu, disk_bytes=written + 2**24))


def quantizable(headers: Headers) -> list:  # type: ignore[type-arg]
    """Return the matrices that are neither embeddings nor an output head, by their names."""
    outside = ("embed", "wte", "wpe", "lm_head", "shared", "classifier", "score", "position")
    return [
        t
        for name, t in headers.modules.items()
        if not any(word in name.rsplit(".", 1)[-1] for word in outside)
        and ".embeddings." not in f".{name}."
    ]


def _scales(shape: tuple[int, ...], group_size: object) -> int:
    if isinstance(group_size, int):
        return shape[0] * -(-shape[1] // group_size)
    return shape[0] * (1 if group_size == "channel" else -(-shape[1] // 32))
