"""What generating will need, from headers alone."""

from __future__ import annotations

from bmkit.env import format_bytes
from bmkit.errors import RecipeError
from bmkit.infer.recipe import InferRecipe
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers
from bmkit.runtime import budget, family
from bmkit.runtime.budget import Placement

PROMPT_TOKENS = 512
"""Tokens of a prompt that are planned for; a longer one takes more, where there is no budget."""


def placement(job: Job, headers: Headers) -> Placement | None:
    """Say where the model's weights will be, if it runs packed on the CPU; else None.

    Raises ResourceError for a budget that can't work, RecipeError for `quant` elsewhere.
    """
    recipe = job.recipe
    assert isinstance(recipe, InferRecipe)  # the registry pairs recipe and plan
    packed = (
        recipe.device == "cpu"
        and recipe.dtype in {"auto", "float32"}
        and all(family.plain_lora(delta.path) for delta in job.deltas)
        and family.covers(headers.config)
    )
    if not packed:
        if recipe.quant:
            raise RecipeError(
                "quant: works on the CPU, for models of the families "
                f"{', '.join(family.FAMILY)}, with no adapters but LoRA",
                hint="elsewhere, compress the model first: bmkit compress int8",
            )
        return None
    context = int(headers.config.get("max_position_embeddings") or 2**20)
    tokens = min(recipe.max_new_tokens + PROMPT_TOKENS, context)
    return budget.place(
        headers,
        rows=recipe.batch_size,
        tokens=tokens,
        budget=job.cpu_memory,
        quant=recipe.quant,
        besides=sum(3 * read_headers(delta.path).bytes for delta in job.deltas),
    )


def estimate(job: Job) -> Estimate:
    """Say what `infer` will run, and the memory it takes: weights, and the cache of one batch."""
    recipe = job.recipe
    assert isinstance(recipe, InferRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    draw = "draw tokens at random" if recipe.sampled else "take the likeliest token"
    if (found := placement(job, headers)) is not None:
        kept = len(found.resident)
        steps = [
            f"load {headers.dense_numel} parameters, packed: {kept} of {len(found.units)} units "
            f"resident, {format_bytes(found.streamed_bytes)} a token read from disk",
            *(f"attach {delta.path}" for delta in job.deltas),
            draw,
        ]
        return Estimate(steps, Peak(RUNTIME_BYTES + found.peak_bytes, 0, 0))
    return _dense(job, headers, draw)


def _dense(job: Job, headers: Headers, draw: str) -> Estimate:
    recipe = job.recipe
    assert isinstance(recipe, InferRecipe)  # as above
    config = headers.config
    on_gpu = recipe.device != "cpu"
    width = 2 if "16" in recipe.dtype or (recipe.dtype == "auto" and on_gpu) else 4
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    kv_width = int(config.get("head_dim") or hidden // heads) * int(
        config.get("num_key_value_heads") or heads
    )
    depth = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    tokens = recipe.batch_size * (recipe.max_new_tokens + 256)
    cache = 2 * width * depth * kv_width * tokens
    logits = 3 * 4 * recipe.batch_size * int(config.get("vocab_size") or 0)
    weights = width * headers.dense_numel
    steps = [f"load {headers.dense_numel} parameters, {8 * width} bits each"]
    steps += [f"attach {delta.path}" for delta in job.deltas]
    steps.append(draw)
    largest = max((t.bytes for t in headers.tensors), default=0)
    need = weights + cache + logits
    if on_gpu:
        return Estimate(steps, Peak(RUNTIME_BYTES + 4 * largest, need + 500 * 2**20, 0))
    return Estimate(steps, Peak(RUNTIME_BYTES + need + largest, 0, 0))
