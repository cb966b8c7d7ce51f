"""What making a prompt, and asking one, will need: from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from bmkit.deltas.recipe import names
from bmkit.deltas.sizes import parameters
from bmkit.deltas.stacked import stacked_of_headers
from bmkit.deltas.stored import modules_of_headers
from bmkit.deltas.targets import addressed, parameters_addressed
from bmkit.env import format_bytes
from bmkit.errors import InputError, RecipeError, UsageError
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers, task
from bmkit.prompt import kept as shelf
from bmkit.prompt import rows, templates
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompt.rows import Split
from bmkit.prompt.searching import Search
from bmkit.prompt.tasks import longest
from bmkit.prompting.chat import Chat
from bmkit.prompting.wrap import wrap
from bmkit.runtime import budget
from bmkit.runtime.budget import Placement, Sizes, place_any
from bmkit.runtime.family import readable
from bmkit.runtime.recipe import GenerateRecipe

_SOFT = re.compile(r"""['"]soft(_id)?\\?['"]""")
WRITER_ROWS = 64
"""Rows that are reckoned with for the model that writes templates."""
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
    _require_fields(job, recipe, splits.values())
    counts = [f"{len(split.records)} rows of {name}" for name, split in splits.items()]
    steps = [f"ask a {kind} model about {', '.join(counts) or 'no rows'}"]
    trains = recipe.tune.mode != "none"
    if trains:
        seeds = len(recipe.learning_setting.seeds) or 1
        soft = ["soft tokens"] if _has_soft(job, recipe) else []
        own = [f"a {recipe.verbalizer.type} verbalizer"] if recipe.verbalizer.reads_states else []
        what = ", ".join([*soft, *own, *names(recipe.tune.deltas)])
        if recipe.tune.mode == "full":
            what = "the whole model"
        steps.insert(0, f"train {what}" + (f", with {seeds} seeds" if seeds > 1 else ""))
    if recipe.ensemble is not None:
        steps.append(f"let {1 + len(recipe.ensemble.members)} prompts, each seed, tell together")
    if recipe.calibrate.type != "none":
        steps.append(f"calibrate: {recipe.calibrate.type}")
    most = longest(recipe.task, recipe.template.max_seq_length, recipe.generate)
    size = recipe.train.per_device_eval_batch_size
    if recipe.search is not None:
        steps[:0] = _searches(job, recipe.search, most)
    if trains and placement(job, size, most) is not None:
        raise RecipeError(
            "tune.mode: a prompt isn't trained within a budget", hint="leave the budget out"
        )
    layers = 1
    if trains:  # the backward pass reads the activations of all
        layers = int(headers.config.get("num_hidden_layers") or headers.config.get("num_layers", 1))
        trained = (recipe.train.per_device_train_batch_size, layers)
        size, layers = max((size, 1), trained, key=math.prod)  # rows that are asked need no more
    found = _estimate(job, headers, steps, size, most, layers)
    if recipe.tune.mode == "full":
        found = _with_whole(job, headers, found)
    if recipe.tune.deltas:
        found = _with_deltas(job, headers, found)
    writer = job.models.get("search.model")
    return found if writer is None else _with_writer(job, found, read_headers(writer.path))


def _with_writer(job: Job, found: Estimate, headers: Headers) -> Estimate:
    """Return an estimate with the model that writes templates, which is there before the other."""
    other = _whole(job, headers, WRITER_ROWS)
    ram = max(found.peak.ram_bytes, other.ram_bytes)
    gpu = max(found.peak.gpu_bytes, other.gpu_bytes)
    return Estimate(found.steps, replace(found.peak, ram_bytes=ram, gpu_bytes=gpu))


def _searches(job: Job, spec: Search, most: int) -> list[str]:
    """Return what a search does. Raises InputError for a model that can't write templates."""
    found = ["try templates and words on what the model says once for each template and row"]
    if (writer := job.models.get("search.model")) is not None:
        config = read_headers(writer.path).config
        if kind_of(config) != "seq2seq":
            raise InputError(
                f"search.model: {writer.path} is no seq2seq model, as writes templates",
                hint="take a T5",
            )
        if placement(job, 1, most) is not None:
            raise RecipeError(
                "search.model: templates aren't written within a budget", hint="leave it out"
            )
        what = f"write {spec.num_templates} templates with {writer.path.name}"
        found.insert(0, f"{what}, going on with {spec.beam_width} texts")
    return found


def _require_fields(job: Job, recipe: PromptRecipe, splits: Iterable[Split]) -> None:
    """Raise InputError if the first row of a split lacks what a template reads.

    A chat is put together by the tokenizer alone: that is looked at when it is run.
    """
    specs = templates.every(recipe.template.model_dump(), job.files.get("template.file_path"))
    for split in splits:
        record = split.records[0]
        for spec in specs:
            parsed = templates.parse(spec)
            if isinstance(parsed, Chat):
                continue
            try:
                wrap(parsed, record.values, record.line)
            except InputError as exc:
                raise InputError(f"{record.where}: {exc}", hint=exc.hint) from None


def _has_soft(job: Job, recipe: PromptRecipe) -> bool:
    """Tell whether any template of the recipe has trainable tokens."""
    specs = templates.every(recipe.template.model_dump(), job.files.get("template.file_path"))
    if recipe.ensemble is not None:
        specs += [member.template.model_dump() for member in recipe.ensemble.members]
    return any(_SOFT.search(str(spec)) for spec in specs)


def _with_deltas(job: Job, headers: Headers, found: Estimate) -> Estimate:
    """Return what it takes to keep the deltas, and the checkpoints of a run.

    Raises RecipeError for one that goes nowhere in this model.
    """
    recipe = job.recipe
    assert isinstance(recipe, PromptRecipe)  # as above
    sizes, modules = Sizes.of(headers.config), modules_of_headers(headers)
    stacked = stacked_of_headers(headers)
    count = 0
    for spec in recipe.tune.deltas:
        shapes = [modules[name].shape for name in addressed(spec, modules)[0]]
        shapes += [stacked[name].shape for name in parameters_addressed(spec, modules, stacked)]
        count += parameters(spec, shapes, sizes.hidden, sizes.layers)
    members = 1 if recipe.ensemble is None else 1 + len(recipe.ensemble.members)
    runs = members * max(len(recipe.learning_setting.seeds), 1)
    peak = found.peak
    disk = peak.disk_bytes + 4 * count * (1 if recipe.ensemble is None else runs)
    work = peak.work_bytes + 4 * count * runs + 12 * count  # with the moments of the one at work
    return Estimate(found.steps, replace(peak, disk_bytes=disk, work_bytes=work))


def _with_whole(job: Job, headers: Headers, found: Estimate) -> Estimate:
    """Return what it takes to train all weights as well: gradients, two moments, what is kept.

    Raises RecipeError if there are deltas on them.
    """
    recipe = job.recipe
    assert isinstance(recipe, PromptRecipe)  # as above
    if job.deltas:
        raise RecipeError(
            "tune.mode: the whole of a model is trained, and this is a delta on one",
            hint="merge it first: bmkit merge",
        )
    more, peak = 12 * headers.dense_numel, found.peak
    members = 1 if recipe.ensemble is None else 1 + len(recipe.ensemble.members)
    kept = 4 * headers.dense_numel * members * max(len(recipe.learning_setting.seeds), 1)
    gpu = peak.gpu_bytes + more if peak.gpu_bytes else 0
    ram = peak.ram_bytes if gpu else peak.ram_bytes + more
    tried = 1 if recipe.search is None else recipe.search.num_trained
    return Estimate(found.steps, Peak(ram, gpu, kept + 2**20, kept * tried + 3 * more))


def estimate_answers(job: Job) -> Estimate:
    """Say what `infer` on a prompt will do and need."""
    recipe = job.recipe
    assert isinstance(recipe, GenerateRecipe)  # the registry pairs recipe and plan
    if recipe.scores:
        raise UsageError("a prompt tells labels: it has nothing to --score")
    assert job.prompt is not None  # the pipeline sends prompts here
    kept = shelf.read(job.prompt.path)
    if recipe.system is not None:
        raise UsageError("a prompt has a template: leave --system out")
    if kept.first.task != "generation" and recipe.logprobs is not None:
        raise UsageError("a prompt tells labels: leave --logprobs out")
    headers = read_headers(job.checkpoint)
    kind_of(headers.config, kept.first.model_kind)
    told = {"probing": "the likeliest words", "generation": "a text"}
    steps = [f"tell {told.get(kept.first.task, f'one of {len(kept.first.labels)} labels')}"]
    if kept.ensemble is not None:
        steps[0] += f", by {len(kept.prompts)} prompts together"
    found = _estimate(job, headers, steps, recipe.batch_size, kept.tokens)
    models = len(kept.prompts) if kept.ensemble and shelf.own_model(job.prompt.path) else 1
    if models > 1 and (job.cpu_memory or job.gpu_memory or recipe.quant):
        raise UsageError("an ensemble of whole models goes within no budget, and without --quant")
    width = budget.computed_bytes(recipe.dtype, recipe.device, headers)
    more, peak = (models - 1) * width * headers.dense_numel, found.peak
    gpu = peak.gpu_bytes + more if peak.gpu_bytes else 0
    return Estimate(found.steps, Peak(peak.ram_bytes + (0 if gpu else more), gpu, peak.disk_bytes))


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
    return Estimate(steps, _whole(job, headers, size, layers))


def _whole(job: Job, headers: Headers, size: int, layers: int = 1) -> Peak:
    """Return what a whole model needs that `size` rows are put to."""
    on_gpu = job.recipe.device != "cpu"
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
        return Peak(RUNTIME_BYTES + 4 * largest, need, 2**20)
    return Peak(RUNTIME_BYTES + weights + largest + activations, 0, 2**20)


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
        width=budget.computed_bytes(recipe.dtype, recipe.device, headers),
    )


def _fills_masks(headers: Headers) -> bool:
    name: str = (headers.config.get("architectures") or [""])[0]
    return name.endswith("ForMaskedLM")
