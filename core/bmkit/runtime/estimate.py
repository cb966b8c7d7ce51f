"""What generating will need, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bmkit.env import format_bytes
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers
from bmkit.runtime import budget
from bmkit.runtime.choose import choose
from bmkit.runtime.recipe import GenerateRecipe


def estimate(job: Job) -> Estimate:
    """Say what a stage that generates will run, and the memory that weights and caches take."""
    recipe = job.recipe
    assert isinstance(recipe, GenerateRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    draw = "draw tokens at random" if recipe.sampled else "take the likeliest token"
    chosen = choose(job, headers)
    found = chosen.placement
    width = 2 if "16" in recipe.dtype or (recipe.dtype == "auto" and recipe.device != "cpu") else 4

    def rates() -> Mapping[str, float]:
        from bmkit.runtime import expect

        file = max((t.file for t in headers.tensors), key=lambda f: f.stat().st_size)
        machine = expect.rates(file, device=recipe.device, threads=job.threads)
        return expect.expect(chosen, headers, machine, width=width)

    if found is None:
        return _dense(job, headers, draw, width, rates)
    on_gpu = recipe.device.startswith("cuda")
    kept = len(found.resident)
    source = "copied to the GPU" if on_gpu else "read from disk"
    steps = [
        f"load {headers.dense_numel} parameters, packed: {kept} of {len(found.units)} units "
        f"resident, {format_bytes(found.streamed_bytes)} a token {source}",
        *(f"attach {delta.path}" for delta in job.deltas),
        draw,
    ]
    if not on_gpu:
        return Estimate(steps, Peak(RUNTIME_BYTES + found.peak_bytes, 0, 0), rates)
    in_ram, room = found.streamed_bytes, budget.room_in_ram(job.cpu_memory)
    if room is not None and in_ram > room:  # then some wait on disk, and are read into slabs
        in_ram = max(room, 3 * found.slot_bytes // 2)
    need = RUNTIME_BYTES + in_ram + budget.HOST_BYTES
    return Estimate(steps, Peak(need, found.peak_bytes, 0), rates)


def _dense(
    job: Job,
    headers: Headers,
    draw: str,
    width: int,
    rates: Callable[[], Mapping[str, float]],
) -> Estimate:
    recipe = job.recipe
    assert isinstance(recipe, GenerateRecipe)  # as above
    sizes = budget.Sizes.of(headers.config)
    on_gpu = recipe.device != "cpu"
    tokens = recipe.batch_size * (recipe.max_new_tokens + 256)
    cache = 2 * width * sizes.layers * sizes.kv * sizes.dim * tokens
    logits = 3 * 4 * recipe.batch_size * sizes.vocabulary
    weights = width * headers.dense_numel
    steps = [f"load {headers.dense_numel} parameters, {8 * width} bits each"]
    steps += [f"attach {delta.path}" for delta in job.deltas]
    steps.append(draw)
    largest = max((t.bytes for t in headers.tensors), default=0)
    need = weights + cache + logits
    if on_gpu:
        return Estimate(steps, Peak(RUNTIME_BYTES + 4 * largest, need + 500 * 2**20, 0), rates)
    return Estimate(steps, Peak(RUNTIME_BYTES + need + largest, 0, 0), rates)
