"""What making a prompt, and asking one, will need: from headers alone."""

from __future__ import annotations

from bmkit.deltas.recipe import names
from bmkit.env import format_bytes
from bmkit.errors import InputError, RecipeError, UsageError
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers, task
from bmkit.prompt import rows, stored, templates
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompt.tasks import longest
from bmkit.runtime import budget
from bmkit.runtime.budget import Placement, Sizes, place_any
from bmkit.runtime.family import readable
from bmkit.runtime.recipe import GenerateRecipe

TOKENS = 128
"""Tokens of a row that are reckoned with where there is no budget."""


def estimate(job: Job) -> Estimate:
    """Say what `prompt` will do and need. Raises BmkitError for a template or rows that are wrong.

    Activations are counted as 34 values of the hidden width a token, of one layer, or
    where something is trained of all.
    """
    recipe = job.recipe
    assert isinstance(recipe, PromptRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    kind = kind_of(headers.config, recipe.model_kind)
    templates.written(recipe.template.model_dump(), job.files.get("template.file_path"))
    splits = rows.read(recipe, job.files)
    counts = [f"{len(split.records)} rows of {name}" for name, split in splits.items()]
    steps = [f"ask a {kind} model about {', '.join(counts) or 'no rows'}"]
    trains = recipe.tune.mode != "none"
    if trains:
        seeds = len(recipe.learning_setting.seeds) or 1
        what = ", ".join(["soft tokens", *names(recipe.tune.deltas)])
        steps.insert(0, f"train {what}" + (f", with {seeds} seeds" if seeds > 1 else ""))
    if recipe.calibrate.type != "none":
        steps.append(f"calibrate: {recipe.calibrate.type}")
    most = longest(recipe.task, recipe.template.max_seq_length, recipe.generate)
    size = recipe.train.per_device_eval_batch_size
    if trains and placement(job, size, most) is not None:
        raise RecipeError(
            "tune.mode: a prompt isn't trained within a budget", hint="leave the budget out"
        )
    layers = 1
    if trains:  # the backward pass reads the activations of all
        layers = int(headers.config.get("num_hidden_layers") or headers.config.get("num_layers", 1))
        size = max(size, recipe.train.per_device_train_batch_size)
    return _estimate(job, headers, steps, size, most, layers)


def estimate_answers(job: Job) -> Estimate:
    """Say what `infer` on a prompt will do and need."""
    recipe = job.recipe
    assert isinstance(recipe, GenerateRecipe)  # the registry pairs recipe and plan
    if recipe.scores:
        raise UsageError("a prompt tells labels: it has nothing to --score")
    assert job.prompt is not None  # the pipeline sends prompts here
    kept = stored.read(job.prompt.path)
    headers = read_headers(job.checkpoint)
    kind_of(headers.config, kept.model_kind)
    told = {"probing": "the likeliest words", "generation": "a text"}
    steps = [f"tell {told.get(kept.task, f'one of {len(kept.labels)} labels')}"]
    most = longest(kept.task, kept.max_seq_length, kept.generate)
    return _estimate(job, headers, steps, recipe.batch_size, most)


def _estimate(
    job: Job, headers: Headers, steps: list[str], size: int, most: int, layers: int = 1
) -> Estimate:
    steps = [*(f"attach {delta.path}" for delta in job.deltas), *steps]
    found = placement(job, size, most)
    on_gpu = job.recipe.device != "cpu"
    if found is not None:
        kept = f"{len(found.resident)} of {len(found.units)} units resident"
        steps.insert(0, f"{kept}, {format_bytes(found.streamed_bytes)} streamed for each batch")
        need = RUNTIME_BYTES + (2**30 if on_gpu else found.peak_bytes)
        return Estimate(steps, Peak(need, found.peak_bytes if on_gpu else 0, 2**20))
    sizes = Sizes.of(headers.config)
    narrow = "16" in job.recipe.dtype or (job.recipe.dtype == "auto" and on_gpu)
    width = 2 if narrow else 4
    activations = (
        width * size * TOKENS * 34 * sizes.hidden * layers + 3 * 4 * size * sizes.vocabulary
    )
    weights = width * headers.dense_numel
    largest = max((t.bytes for t in headers.tensors), default=0)
    if on_gpu:
        need = weights + activations + 500 * 2**20
        return Estimate(steps, Peak(RUNTIME_BYTES + 4 * largest, need, 2**20))
    return Estimate(steps, Peak(RUNTIME_BYTES + weights + largest + activations, 0, 2**20))


def placement(job: Job, size: int, most: int) -> Placement | None:
    """Say where weights will be, if memory has a budget or they are rounded for this run.

    It is planned for `size` prompts of `most` tokens, or fewer of them. Raises ResourceError if the
    budget can't work, InputError for a model that can't be placed.
    """
    recipe = job.recipe
    on_gpu = recipe.device.startswith("cuda")
    limit = job.gpu_memory if on_gpu else job.cpu_memory
    quant = getattr(recipe, "quant", None)
    if limit is None and quant is None:
        return None
    headers = read_headers(job.checkpoint)
    own = task(headers.config) == "generate" or _fills_masks(headers)
    if not own or not readable(headers.config.get("quantization_config")):
        raise InputError(
            f"{job.checkpoint} can't be placed within a budget, or rounded for one run",
            hint="leave the budget and --quant out",
        )
    tokens = min(most, int(headers.config.get("max_position_embeddings") or most))
    return place_any(
        headers,
        rows=size,
        tokens=tokens,
        prompt=tokens,
        budget=limit,
        quant="int8" if quant == "w8a8" else quant,
        besides=budget.lora_bytes([read_headers(path) for path in job.adapter_paths]),
        gpu=on_gpu,
        width=4 if not on_gpu or recipe.dtype == "float32" else 2,
    )


def _fills_masks(headers: Headers) -> bool:
    name: str = (headers.config.get("architectures") or [""])[0]
    return name.endswith("ForMaskedLM")
