"""What tuning will need, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bmkit import env
from bmkit.artifact import QUANTO
from bmkit.data.slices.tokens import marks
from bmkit.deltas import address
from bmkit.deltas.modules import Module
from bmkit.deltas.recipe import LowRankAdapter, Vera, names
from bmkit.deltas.sizes import inner_width, parameters
from bmkit.deltas.stacked import stacked_of_headers
from bmkit.deltas.stored import modules_of_headers
from bmkit.deltas.targets import addressed, parameters_addressed
from bmkit.env import format_bytes
from bmkit.errors import InputError, RecipeError
from bmkit.foreign import extra
from bmkit.plan import (
    RUNTIME_BYTES,
    Estimate,
    Headers,
    Job,
    Peak,
    read_headers,
)
from bmkit.runtime.budget import Placement, Sizes, computed_bytes, place_any
from bmkit.runtime.family import readable
from bmkit.tune.foreseen import (
    require_duplex,
    require_front,
    require_measured,
    require_once,
    require_placed,
    require_rows,
    require_shared,
    require_strength,
)
from bmkit.tune.recipe import TuneRecipe
from bmkit.tune.task import new_head, task_of


def estimate(job: Job) -> Estimate:
    """Say what `tune` will train, and the memory and disk it takes.

    Activations are counted as 34 values of the hidden width a layer and token, and the logits
    three times in float32. Raises RecipeError if an address matches nothing, ResourceError if what
    the recipe needs isn't installed.
    """
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # the registry pairs recipe and plan
    if recipe.train.tensorboard:
        extra.require("tensorboard", "tensorboard", "`train.tensorboard`")
    headers = read_headers(job.checkpoint)
    if (job.checkpoint / QUANTO).is_file():  # tells no shapes, and its layers are another library's
        raise InputError(
            f"{job.checkpoint} is quantised by optimum-quanto",
            hint="tune the model it was made from, or one of int8, int4 or gptq",
        )
    task = task_of(recipe, headers.config, job.files["data.train"])
    require_measured(recipe, task)
    require_front(recipe, task)
    require_duplex(recipe, task)
    require_strength(recipe)
    if task == "duplex" and recipe.slice.threshold == "calibrate" and "data.dev" not in job.files:
        job.reporter.warn("slice.threshold: there is no data.dev to calibrate it on: it is argmax")
    require_rows(task, job.files)
    parts, trained = _trained(job, headers)
    _warn_of_ranks(job, headers)
    own = recipe.own_words(env.process()[1]) if task == "duplex" else 0
    said = [f"let the model say {own} tokens of its own, to be mixed in"] if own else []
    steps = [*said, *parts, *(["merge it into the model"] if recipe.merge else [])]
    disk = (2 * headers.dense_numel if recipe.merge else 4 * trained) + 2**24
    work = 3 * (12 * trained + 2**22)  # two checkpoints are kept while a third is written
    placed = placement(job)
    if env.shares_weights():
        require_shared(recipe, placed=placed is not None)
        steps.append(f"share the frozen weights out among {env.process()[1]} processes")
    if placed is not None:
        kept = f"{len(placed.resident)} of {len(placed.units)} units resident"
        steps.insert(0, f"{kept}, {format_bytes(placed.streamed_bytes)} streamed there and back")
        ram = RUNTIME_BYTES + (placed.peak_bytes if recipe.device == "cpu" else 2**30)
        gpu = 0 if recipe.device == "cpu" else placed.peak_bytes
        return Estimate(steps, Peak(ram, gpu, disk_bytes=disk, work_bytes=work))
    depth = Sizes.of(headers.config).layers
    kept_layers = depth if recipe.train.gradient_checkpointing is False else 2
    activations = _activations(job, headers, kept_layers)
    ram = RUNTIME_BYTES + 4 * headers.dense_numel + 16 * trained + activations
    gpu = ram - RUNTIME_BYTES if recipe.device != "cpu" else 0
    if gpu and env.shares_weights():  # each has its part; RAM the whole, until it is shared out
        gpu -= 4 * headers.dense_numel * (env.process()[1] - 1) // env.process()[1]
    return Estimate(steps, Peak(ram, gpu, disk_bytes=disk, work_bytes=work))


def placement(job: Job) -> Placement | None:
    """Say where the frozen weights will be, if the device's memory has a budget; else None.

    Raises ResourceError if the budget can't work, RecipeError if something needs the whole model.
    """
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # as above
    on_gpu = recipe.device.startswith("cuda")
    budget = job.gpu_memory if on_gpu else job.cpu_memory
    if budget is None or not (on_gpu or recipe.device == "cpu"):
        return None
    if recipe.merge:
        raise RecipeError(
            "merge: the model is never whole in memory under a budget",
            hint="tune without merge, then merge without the budget",
        )
    headers = read_headers(job.checkpoint)
    require_placed(recipe, task_of(recipe, headers.config, job.files["data.train"]))
    if not readable(headers.config.get("quantization_config")):
        raise InputError(f"{job.checkpoint} is packed in a way that can't be placed")
    depth = Sizes.of(headers.config).layers
    # One block's activations, and the hidden states between all of them.
    training = 16 * _trained(job, headers)[1] + _activations(job, headers, 2 + depth // 16)
    return place_any(
        headers,
        rows=1,
        tokens=64,
        prompt=64,
        budget=budget,
        besides=training,
        gpu=on_gpu,
        width=computed_bytes(recipe.dtype, recipe.device, headers),
    )


def _trained(job: Job, headers: Headers) -> tuple[list[str], int]:
    """Return what is trained, a line each, and how many parameters that is together."""
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # as above
    labels, head = new_head(recipe, headers, job.files["data.train"])
    new = [f"train a head for {labels} labels ({head} parameters)"] if labels else []
    if "all" in recipe.unfreeze:
        whole = headers.dense_numel
        return [f"train the whole model ({whole} parameters)", *new], whole + head
    sizes = Sizes.of(headers.config)
    modules, stacked = modules_of_headers(headers), stacked_of_headers(headers)
    steps, whole = [], 0
    goes: dict[str, list[str]] = {}
    for name, spec in zip(names(recipe.deltas), recipe.deltas, strict=True):
        found = goes[name] = addressed(spec, modules)[0]
        shapes = [modules[module].shape for module in found]
        experts = parameters_addressed(spec, modules, stacked)
        shapes += [stacked[name].shape for name in experts]
        count = parameters(spec, shapes, sizes.hidden, sizes.layers)
        told = [f"{len(found)} modules"] if found else []
        told += [f"{len(experts)} parameters of experts"] if experts else []
        where = f" on {' and '.join(told)}" if told else ""
        steps.append(f"train {name}{where} ({count} parameters)")
        whole += count
    if task_of(recipe, headers.config, job.files["data.train"]) == "duplex":
        tied = not any(tensor.name.endswith(HEADS) for tensor in headers.tensors)
        count = len(marks(recipe.scheme.name)) * sizes.hidden * (1 if tied else 2)
        steps.append(f"train the rows of the marks between slices ({count} parameters)")
        whole += count
    unfrozen = _unfrozen(modules, recipe)
    require_once(unfrozen, goes)
    own = sum(
        math.prod(module.shape)
        for name, module in modules.items()
        if module.shape and any(f"{name}.".startswith(f"{outer}.") for outer in unfrozen)
    )
    if own:
        steps.append(f"train {', '.join(recipe.unfreeze)} ({own} parameters)")
    return [*steps, *new], whole + own + head


HEADS = ("lm_head.weight", "embed_out.weight")
"""Of a model whose head isn't its embedding."""


def _warn_of_ranks(job: Job, headers: Headers) -> None:
    """Warn of ranks that no product of such matrices can have."""
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # as above
    modules, hidden = modules_of_headers(headers), Sizes.of(headers.config).hidden
    for name, spec in zip(names(recipe.deltas), recipe.deltas, strict=True):
        if not isinstance(spec, LowRankAdapter | Vera):
            continue
        shapes = [modules[module].shape or (hidden,) for module in addressed(spec, modules)[0]]
        if isinstance(spec, Vera):
            key, rank, most = "r", spec.r, max(min(shape) for shape in shapes)
        else:
            key, rank = "low_rank_rank", spec.low_rank_rank
            most = max(inner_width(spec, shape[0]) for shape in shapes)
        if rank > most:
            job.reporter.warn(f"{name}: {key} is {rank}, up to {most} makes a difference")


def _unfrozen(modules: Mapping[str, Module], recipe: TuneRecipe) -> list[str]:
    """Return the modules that are trained themselves."""
    if not recipe.unfreeze:
        return []
    return address.matched(modules, recipe.unfreeze, method="`unfreeze`", key="unfreeze")


def _activations(job: Job, headers: Headers, layers: int) -> int:
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # as above
    sizes = Sizes.of(headers.config)
    tokens = recipe.train.per_device_train_batch_size * _longest(job, recipe.data.max_length)
    return 4 * tokens * (34 * sizes.hidden * layers + 3 * sizes.vocabulary)


def _longest(job: Job, max_length: int) -> int:
    """Return the tokens of the longest row: a token is seldom less than two bytes of its line."""
    with job.files["data.train"].open("rb") as stream:
        return min(max_length, max((len(line) for line in stream), default=0) // 2 + 16)
