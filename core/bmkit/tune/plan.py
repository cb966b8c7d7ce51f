"""What tuning will need, from headers alone."""

from __future__ import annotations

from bmkit.deltas import address
from bmkit.errors import InputError
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers
from bmkit.tune.recipe import TuneRecipe


def estimate(job: Job) -> Estimate:
    """Say what `tune` will train, and the memory and disk it takes.

    Activations are counted as 34 values of the hidden width a layer and token, and the logits
    three times in float32. Raises RecipeError if an address matches nothing.
    """
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    delta = recipe.deltas[0]
    modules = addressable(headers)
    found = address.matched(modules, delta.target_modules, delta.exclude_modules, delta.layers)
    trained = sum(delta.r * _widths(headers, name) for name in found)
    config = headers.config
    tokens = recipe.train.per_device_train_batch_size * _longest(job, recipe.data.max_length)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    depth = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    kept = depth if not recipe.train.gradient_checkpointing else 2
    activations = 4 * tokens * (34 * hidden * kept + 3 * int(config.get("vocab_size") or 0))
    model = 4 * headers.dense_numel
    ram = RUNTIME_BYTES + model + 16 * trained + activations
    disk = (2 * headers.dense_numel if recipe.merge else 4 * trained) + 2**24
    step = f"train {delta.type} on {len(found)} modules ({trained} parameters)"
    steps = [step, *(["merge it into the model"] if recipe.merge else [])]
    gpu = ram - RUNTIME_BYTES if recipe.device != "cpu" else 0
    work = 3 * (12 * trained + 2**22)  # two checkpoints are kept while a third is written
    return Estimate(steps, Peak(ram, gpu, disk_bytes=disk, work_bytes=work))


def _longest(job: Job, max_length: int) -> int:
    """Return the tokens of the longest row: a token is seldom less than two bytes of its line."""
    with job.files["data.train"].open("rb") as stream:
        return min(max_length, max((len(line) for line in stream), default=0) // 2 + 16)


def addressable(headers: Headers) -> list[str]:
    """Return the modules that a delta can go to: matrices that aren't embeddings or a head."""
    outside = ("embed", "wte", "wpe", "lm_head", "shared")
    names = [n for n in headers.modules if not any(w in n.rsplit(".", 1)[-1] for w in outside)]
    if not names:
        raise InputError(f"{headers.path} has no linear layers")
    return names


def _widths(headers: Headers, name: str) -> int:
    tensor = headers.modules[name]
    outputs = tensor.shape[0]
    return outputs + headers.numel(tensor) // outputs
