"""What makes a run lean: rows packed, heads apart, states of frozen blocks kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from bmkit import env
from bmkit.data.chat import Example
from bmkit.errors import RecipeError
from bmkit.plan import Job
from bmkit.train import head as heads
from bmkit.train.frozen import FrozenPrefix, cacheable, numbered, with_rows
from bmkit.train.packing import Packing, pack, packable, way
from bmkit.train.preference import preference_loss
from bmkit.train.trainer import Loss, default_loss, steps_of
from bmkit.tune.objectives import Objective
from bmkit.tune.recipe import TuneRecipe
from bmkit.tune.task import GENERATES

SHARE = 0.5
"""Of the disk that is free, what kept states may take."""


@dataclass(frozen=True)
class Rows:
    """What is trained on, and with which loss."""

    examples: Sequence[Example]
    collate: Callable[[Sequence[Example]], dict[str, Tensor]]
    loss: Loss
    prefix: FrozenPrefix | None = None

    def close(self) -> None:
        """Remove what was kept."""
        if self.prefix is not None:
            self.prefix.close()


def lean_rows(
    job: Job, recipe: TuneRecipe, goal: Objective, model: Any, examples: Sequence[Example]
) -> Rows:
    """Return the rows as the recipe wants them trained on.

    Raises RecipeError for packing, or keeping states, where the model or the task can't.
    """
    collate, loss = goal.collate, goal.loss
    if goal.task in GENERATES:
        loss = default_loss(model)
    elif goal.task == "preference":
        loss = partial(preference_loss, beta=recipe.beta, head=heads.find(model))
    if recipe.data.packing:
        how = way(model) if goal.task in GENERATES else None
        if how is None:
            reason = packable(model) if goal.task in GENERATES else f"the task is {goal.task}"
            raise RecipeError(f"data.packing: rows can't be packed: {reason}", hint="leave it out")
        examples = pack(examples, recipe.data.max_length)
        collate = Packing(goal.pad_token_id, how)
    prefix = _prefix(job, recipe, goal, model, len(examples))
    if prefix is None:
        return Rows(examples, collate, loss)
    job.reporter.info(
        f"what the first {prefix.count} blocks say of each row is kept: they aren't trained"
    )
    return Rows(numbered(examples), with_rows(collate), prefix.around(loss), prefix)


def _prefix(
    job: Job, recipe: TuneRecipe, goal: Objective, model: Any, rows: int
) -> FrozenPrefix | None:
    """Return what keeps the states of frozen blocks, if there are any, and a second epoch."""
    if recipe.cache_states is False:
        return None
    reason = None
    if goal.task == "preference":
        reason = "rows are pairs"
    elif goal.task == "masked_lm":
        reason = "other tokens are hidden in each epoch"
    elif recipe.data.packing:
        reason = "rows are packed"
    elif job.cpu_memory is not None or job.gpu_memory is not None:
        reason = "the model is placed in a budget"
    elif env.shares_weights():
        reason = "the weights are shared out"
    reason = reason or cacheable(model)
    if reason is not None:
        if recipe.cache_states is True:
            raise RecipeError(f"cache_states: they can't be kept: {reason}", hint="leave it out")
        return None
    spec = recipe.train
    seen = steps_of(spec, rows) * spec.gradient_accumulation_steps
    if recipe.cache_states == "auto" and seen * spec.per_device_train_batch_size <= rows:
        return None  # no row comes twice
    limit = int(SHARE * env.free_disk_bytes(job.work))
    return FrozenPrefix(model, job.work / f"states-{env.process()[0]}", limit=limit)
