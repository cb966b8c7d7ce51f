"""Open what a job names: the packed decoder, a model on placed weights, or transformers' own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bmkit import env
from bmkit import model as models
from bmkit.deltas import plugged
from bmkit.errors import ResourceError
from bmkit.plan import Job, read_headers
from bmkit.runtime import budget, experts
from bmkit.runtime.adapters import adapters_of
from bmkit.runtime.choose import Chosen, choose
from bmkit.runtime.generate import plain_defaults
from bmkit.runtime.recipe import GenerateRecipe


@dataclass
class Engine:
    """A model that is ready: `decoder` if its blocks are fused, else `model`."""

    device: torch.device
    rss_before_bytes: int
    """Resident memory just before the model was opened."""
    rows: int
    """Prompts to answer together."""
    decoder: Any = None
    model: Any = None
    placed: Any = None
    chunk: int | None = None
    """Tokens of a prompt to read at once; None: all."""
    most_tokens: int | None = None
    """What a budget was planned for, prompt and answer."""

    def close(self) -> None:
        """Stop reading ahead."""
        if self.placed is not None:
            self.placed.close()
        if self.decoder is not None:
            self.decoder.store.close()


def begin(device: torch.device, *, forget: bool = True) -> int:
    """Return the resident memory just before a model is opened; the peak is counted from here.

    The libraries of a GPU are loaded before: as those of the CPU, they don't count. Without
    `forget`, the peak so far stays.
    """
    if device.type == "cuda":
        for dtype in (torch.float32, *([torch.bfloat16] if models.has_bf16(device) else [])):
            some = torch.ones(16, 16, dtype=dtype, device=device)
            torch.mm(some, some).sum().item()
    if forget:
        env.forget_peak_rss()
    return env.rss_bytes()


def cap_gpu(device: torch.device, limit: int) -> None:
    """Let torch fail rather than take more than `limit` bytes of the GPU, CUDA's own included."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    free, total = torch.cuda.mem_get_info(device)
    if limit > total:
        raise ResourceError(
            f"--gpu-memory {env.format_bytes(limit)}: {device} has {env.format_bytes(total)}"
        )
    own = total - free - torch.cuda.memory_reserved(device)  # with what other processes hold
    torch.cuda.set_per_process_memory_fraction(
        max(limit - min(own, budget.GPU_BYTES), 1) / total, device
    )


def open_engine(
    job: Job, config: Any, *, said: Sequence[int] | None = None, head: bool = False
) -> Engine:
    """Load the job's model with its adapters, in the way that `choose` says.

    With `said`, a fused decoder's head has only the rows of those tokens. With `head`, `config`
    names another head than the checkpoint has, which an adapter brings.
    Raises InputError for what can't be loaded, ResourceError for a budget that can't work.
    """
    recipe = job.recipe
    assert isinstance(recipe, GenerateRecipe)  # the registry pairs recipe and engine
    device = models.pick_device(recipe.device)
    chosen = choose(job, read_headers(job.checkpoint))
    rows = min(recipe.batch_size, job.rows or recipe.batch_size)
    found = None
    if chosen.way == "packed":
        found = _packed(job, recipe, chosen, config, device, said)
    elif chosen.way == "placed" and not head:
        found = _placed(job, recipe, chosen, device)
    if found is None:
        before = begin(device, forget=False)
        asked: dict[str, Any] = {"config": config, "fresh": []} if head else {}
        model = models.load_model(job.checkpoint, device=device, dtype=recipe.dtype, **asked)
        found = Engine(device, before, rows, model=model)
    if found.model is not None:
        if models.task(config) == "generate":
            plain_defaults(found.model)
        asked_for = adapters_of(job)
        found.model = plugged.load(found.model, asked_for.folders, asked_for.wholes)
        experts.attach_stored(found.model, job.checkpoint)
    return found


def _packed(
    job: Job,
    recipe: GenerateRecipe,
    chosen: Chosen,
    config: Any,
    device: torch.device,
    said: Sequence[int] | None,
) -> Engine | None:
    """Load the fused decoder; None if it doesn't compute what the model's own code does."""
    from bmkit.runtime import cpu
    from bmkit.runtime.cpu import load

    divided = (job.checkpoint / experts.FILE).is_file()
    if not cpu.compiled(divided=divided):
        job.reporter.info("compiling kernels for this machine, once (some 15 seconds)")
    threads = torch.get_num_threads()
    load.warm(threads, divided=divided)
    before = begin(device, forget=not job.is_draft)  # a draft counts with its target
    assert chosen.placement is not None  # this way has one
    decoder = load.load_decoder(
        job.checkpoint,
        threads=threads,
        quant=recipe.quant,
        placement=chosen.placement,
        said=said,
    )
    limited = job.cpu_memory is not None or job.tight  # then two unpacked blocks may be too much
    differ = load.tiny_difference(config)
    if not limited:
        differ = max(differ, load.largest_difference(decoder))
    if differ > load.TOLERANCE:
        text = f"the fused blocks differ from the model's own code by {differ:.1e}"
        if limited or recipe.quant:
            raise ResourceError(text, hint="this model runs without budget and quant only")
        job.reporter.warn(f"{text}; not used")
        return None
    if job.deltas:
        asked_for = adapters_of(job)
        load.attach(decoder, asked_for.folders, asked_for.wholes)
    most = None if job.cpu_memory is None else chosen.placement.tokens
    return Engine(device, before, chosen.placement.rows, decoder=decoder, most_tokens=most)


def _placed(job: Job, recipe: GenerateRecipe, chosen: Chosen, device: torch.device) -> Engine:
    """Load the model in transformers' own code on placed weights."""
    from bmkit.runtime import cpu

    if device.type == "cpu" and not cpu.compiled(fused=False):
        job.reporter.info("compiling kernels for this machine, once (some 5 seconds)")
    from bmkit.runtime.placed import load
    from bmkit.runtime.placed.model import Room, place_model

    plan = chosen.placement
    assert plan is not None  # this way has one
    model = load.empty(job.checkpoint)
    if models.task(model.config) == "generate":
        model.generation_config = models.load_generation_config(job.checkpoint)
    dtype = models.compute_dtype(recipe.dtype, models.stored_dtype(model.config), device)
    if device.type == "cpu":
        load.warm()
    before = begin(device, forget=not job.is_draft)  # a draft counts with its target
    on_cpu = device.type == "cpu"
    limit = job.cpu_memory if on_cpu else job.gpu_memory
    weights = None if limit is None else limit - plan.fixed_bytes + plan.rest_bytes
    if limit is not None and not on_cpu:
        cap_gpu(device, limit)
    placed = place_model(
        job.checkpoint,
        model,
        device=device,
        dtype=dtype,
        quant="int8" if recipe.quant == "w8a8" else recipe.quant,
        w8a8=recipe.quant == "w8a8",
        room=Room(weights, None if on_cpu else budget.room_in_ram(job.cpu_memory)),
    )
    whole = limit is None or getattr(model, "_is_stateful", False)
    whole = whole or model.config.model_type in budget.WHOLE
    chunk = None if whole else plan.chunk
    most = None if limit is None else plan.tokens
    return Engine(
        device, before, plan.rows, model=model, placed=placed, chunk=chunk, most_tokens=most
    )


def peak_gpu_bytes(device: torch.device) -> int:
    """Return the most GPU memory that was held, CUDA's own included; 0 on the CPU.

    That is told by the driver where it knows this process. Else CUDA's own share can't be told from
    what other processes hold on the GPU, and counts with as much as a budget leaves it, at most.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    held = _held_by_this_process(device)
    own = min(total - free - reserved, budget.GPU_BYTES) if held is None else held - reserved
    return int(own + torch.cuda.max_memory_reserved(device))


def _held_by_this_process(device: torch.device) -> int | None:
    """Return the bytes that the driver's library says this process holds; None if it doesn't."""
    try:
        import pynvml  # type: ignore[import-not-found]  # comes with some builds of torch
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return next((p.usedGpuMemory or None for p in found if p.pid == os.getpid()), None)
    except (pynvml.NVMLError, AttributeError):  # a driver that doesn't tell
        return None
