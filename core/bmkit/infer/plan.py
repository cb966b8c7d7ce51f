"""What generating will need, from headers alone."""

from __future__ import annotations

from bmkit.infer.recipe import InferRecipe
from bmkit.plan import RUNTIME_BYTES, Estimate, Job, Peak, read_headers


def estimate(job: Job) -> Estimate:
    """Say what `infer` will run, and the memory it takes: weights, and the cache of one batch."""
    recipe = job.recipe
    assert isinstance(recipe, InferRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
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
    steps += [f"attach {a.path}" for a in (*([job.model] if job.base else []), *job.adapters)]
    steps.append("draw tokens at random" if recipe.sampled else "take the likeliest token")
    largest = max((t.bytes for t in headers.tensors), default=0)
    need = weights + cache + logits
    if on_gpu:
        return Estimate(steps, Peak(RUNTIME_BYTES + 4 * largest, need + 500 * 2**20, 0))
    return Estimate(steps, Peak(RUNTIME_BYTES + need + largest, 0, 0))
