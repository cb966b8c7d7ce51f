"""Open the model that is tuned: whole, placed within a budget, or with a new head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bmkit import env
from bmkit import model as models
from bmkit.deltas import address
from bmkit.deltas.modules import modules_of_model
from bmkit.plan import Job
from bmkit.runtime import heads
from bmkit.runtime.budget import room_in_ram
from bmkit.runtime.opening import begin, cap_gpu
from bmkit.tune.duplex import grow
from bmkit.tune.objectives import Objective
from bmkit.tune.plan import placement
from bmkit.tune.recipe import TuneRecipe


@dataclass
class Base:
    """A model that is ready to be tuned: nothing of it is trained yet."""

    model: Any
    fresh: list[str] = field(default_factory=list)
    """Modules that the checkpoint has no weights for: they have to be trained."""
    placed: Any = None
    report: dict[str, Any] = field(default_factory=dict)
    """What `--report` says of memory."""

    def close(self) -> None:
        """Stop reading weights ahead."""
        if self.placed is not None:
            self.placed.close()


def open_base(job: Job, objective: Objective, tokenizer: Any, device: torch.device) -> Base:
    """Load the job's model, for the objective's task, within the job's budget if it has one.

    Raises InputError for a checkpoint that can't be used, ResourceError for a budget that can't
    work, RecipeError for what doesn't go with one.
    """
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # the registry pairs recipe and engine
    report: dict[str, Any] = {"budget_bytes": {"cpu": job.cpu_memory, "gpu": job.gpu_memory}}
    torch.manual_seed(recipe.seed)  # a new head is drawn
    if placement(job) is None:
        report["rss_before_bytes"] = begin(device, forget=False)
        dtype: str = recipe.dtype
        if env.shares_weights():  # the GPU may be too small for all that is to be shared out
            stored = models.stored_dtype(models.load_config(job.checkpoint))
            chosen = models.compute_dtype(dtype, stored, device)
            device, dtype = torch.device("cpu"), str(chosen).removeprefix("torch.")
        if objective.head is None:
            model = models.load_model(job.checkpoint, device=device, dtype=dtype)
            if objective.marks is not None:
                grow(model, objective.marks, tokenizer, seed=recipe.seed)
            return Base(model, report=report)
        config = heads.config_of(job.checkpoint, objective.head, tokenizer)
        model, fresh = heads.load(job.checkpoint, config, device=device, dtype=dtype)
        return Base(model, fresh, report=report)
    return _placed(job, recipe, device, report)


def _placed(job: Job, recipe: TuneRecipe, device: torch.device, report: dict[str, Any]) -> Base:
    """Return the frozen base on placed weights; `report` gets what was resident just before."""
    from bmkit.runtime.placed import load
    from bmkit.runtime.placed.model import Room, place_model

    found = placement(job)
    assert found is not None  # the caller has looked
    model = load.empty(job.checkpoint)
    dtype = models.compute_dtype(recipe.dtype, models.stored_dtype(model.config), device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        load.warm()
    report["rss_before_bytes"] = begin(device)
    limit = job.cpu_memory if on_cpu else job.gpu_memory
    assert limit is not None  # else there is no placement
    if not on_cpu:
        cap_gpu(device, limit)
    weights = limit - found.fixed_bytes + found.rest_bytes
    job.reporter.info(
        f"{len(found.resident)} of {len(found.units)} units resident, "
        f"{env.format_bytes(found.streamed_bytes)} streamed there and back each step"
    )
    placed = place_model(
        job.checkpoint,
        model,
        device=device,
        dtype=dtype,
        room=Room(weights, None if on_cpu else room_in_ram(job.cpu_memory)),
        checkpoint=True,
    )
    return Base(placed.model, placed=placed, report=report)


def unfrozen(model: Any, patterns: Sequence[str], fresh: Sequence[str]) -> list[str]:
    """Return the outermost modules that are trained themselves: those named, and new ones.

    Raises RecipeError for a pattern that matches none.
    """
    found = set(fresh)
    if patterns:
        modules = modules_of_model(model)
        found.update(address.matched(modules, patterns, method="`unfreeze`", key="unfreeze"))
    return sorted(n for n in found if not any(n.startswith(f"{other}.") for other in found))
