"""What generating will need, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from bmkit.env import format_bytes
from bmkit.errors import RecipeError
from bmkit.infer.recipe import InferRecipe
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers, task
from bmkit.runtime import budget, family
from bmkit.runtime.budget import Placement

PROMPT_TOKENS = 512
"""Tokens of a prompt that are planned for where prompts aren't known before."""
BYTES_A_TOKEN = 3
"""The fewest that are reckoned with: of a prompt its bytes are known, not its tokens."""

Way = Literal["packed", "placed", "dense"]


@dataclass(frozen=True)
class Chosen:
    """How a model will run.

    `packed` is the fused decoder on the CPU, `placed` transformers' own code on weights in slabs,
    `dense` transformers' own code on a model that transformers has loaded.
    """

    way: Way
    placement: Placement | None


def choose(job: Job, headers: Headers) -> Chosen:
    """Say how the model will run and where its weights will be.

    Raises ResourceError for a budget that can't work, RecipeError for `quant` where there is none.
    """
    recipe = job.recipe
    assert isinstance(recipe, InferRecipe)  # the registry pairs recipe and plan
    on_gpu = recipe.device.startswith("cuda")
    if recipe.quant == "w8a8" and not on_gpu:
        raise RecipeError(
            f"quant: w8a8 needs a GPU, this is {recipe.device}",
            hint="int8 is as small, and the quickest on a CPU",
        )
    quant = "int8" if recipe.quant == "w8a8" else recipe.quant
    readable = family.readable(headers.config.get("quantization_config"))
    exact = recipe.dtype in {"auto", "float32"}
    limit = job.gpu_memory if on_gpu else job.cpu_memory
    context = int(headers.config.get("max_position_embeddings") or 2**20)
    prompt = PROMPT_TOKENS
    if job.longest is not None:
        size = job.longest + len((recipe.system or "").encode())
        prompt = max(prompt, size // BYTES_A_TOKEN + 64)
    generates = task(headers.config) == "generate"
    answer = recipe.max_new_tokens if generates and not recipe.score else 0
    tokens = min(answer + prompt, context)
    besides = sum(3 * read_headers(delta.path).bytes for delta in job.deltas)
    rows = 1 if recipe.score else min(recipe.batch_size, job.rows or recipe.batch_size)
    lora = all(family.plain_lora(delta.path) for delta in job.deltas)
    if recipe.device == "cpu" and exact and lora and generates and family.covers(headers.config):
        found = budget.place(
            headers,
            rows=rows,
            tokens=tokens,
            budget=limit,
            quant=quant,
            besides=besides,
        )
        return Chosen("packed", found)
    packed = any(t.name.endswith("_packed") for t in headers.tensors)
    wanted = recipe.quant is not None or limit is not None or packed or not generates
    if readable and ((recipe.device == "cpu" and exact) or (on_gpu and wanted)):
        width = 4 if recipe.device == "cpu" or recipe.dtype == "float32" else 2
        placed = budget.place_any(
            headers,
            rows=rows,
            tokens=tokens,
            prompt=min(prompt, context),
            budget=limit,
            quant=quant,
            besides=besides,
            gpu=on_gpu,
            width=width,
        )
        return Chosen("placed", placed)
    if recipe.quant:
        raise RecipeError(
            f"quant: can't be had with device {recipe.device}, dtype {recipe.dtype} and this model",
            hint="it works on cuda, and on cpu with dtype auto; else: bmkit compress int8",
        )
    return Chosen("dense", None)


def estimate(job: Job) -> Estimate:
    """Say what `infer` will run, and the memory it takes: weights, and the cache of one batch."""
    recipe = job.recipe
    assert isinstance(recipe, InferRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    draw = "draw tokens at random" if recipe.sampled else "take the likeliest token"
    chosen = choose(job, headers)
    found = chosen.placement
    width = 2 if "16" in recipe.dtype or (recipe.dtype == "auto" and recipe.device != "cpu") else 4

    def rates() -> Mapping[str, float]:
        from bmkit.infer import expect

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
    in_ram = min(found.streamed_bytes, job.cpu_memory or found.streamed_bytes)
    return Estimate(steps, Peak(RUNTIME_BYTES + in_ram + 2**28, found.peak_bytes, 0), rates)


def _dense(
    job: Job,
    headers: Headers,
    draw: str,
    width: int,
    rates: Callable[[], Mapping[str, float]],
) -> Estimate:
    recipe = job.recipe
    assert isinstance(recipe, InferRecipe)  # as above
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
