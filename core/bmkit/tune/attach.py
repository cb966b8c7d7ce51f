"""Put a recipe's deltas on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bmkit.deltas import compose, configs
from bmkit.deltas.configs import Place
from bmkit.deltas.merge import require_mergeable
from bmkit.deltas.modules import modules_of_model
from bmkit.deltas.recipe import names
from bmkit.deltas.stacked import stacked_of_model
from bmkit.deltas.targets import addressed, parameters_addressed
from bmkit.errors import LibraryRefusal, RecipeError
from bmkit.plan import Job
from bmkit.tune.base import Base, unfrozen
from bmkit.tune.objectives import Objective
from bmkit.tune.recipe import TuneRecipe

METHODS: dict[str, Callable[[Any, Place], Any]] = {
    "lora": configs.lora,
    "adalora": configs.adalora,
    "ia3": configs.ia3,
    "vera": configs.vera,
    "oft": configs.oft,
    "boft": configs.boft,
    "layer_norm": configs.layer_norm,
    "trainable_tokens": configs.trainable_tokens,
    "prefix": configs.prefix,
    "prompt": configs.prompt,
    "p_tuning": configs.p_tuning,
    "adapter": configs.adapter,
    "parallel_adapter": configs.parallel_adapter,
    "compacter": configs.compacter,
    "low_rank_adapter": configs.low_rank_adapter,
    "bitfit": configs.bitfit,
}


def attach(
    job: Job, recipe: TuneRecipe, goal: Objective, base: Base, tokenizer: Any
) -> tuple[Any, list[str]]:
    """Put the recipe's deltas on the model; return it with their names, in their order."""
    if "all" in recipe.unfreeze:
        base.model.requires_grad_(True)
        return base.model, []
    saved = unfrozen(base.model, recipe.unfreeze, base.fresh)
    base.model.requires_grad_(False)
    if not recipe.deltas:
        for name in saved:
            base.model.get_submodule(name).requires_grad_(True)
        return base.model, []
    called = names(recipe.deltas)
    bare = [spec.PROMPT or spec.type == "trainable_tokens" for spec in recipe.deltas]
    carrier = bare.index(False) if False in bare else None
    lost = recipe.unfreeze or any(not spec.PROMPT for spec in recipe.deltas)
    if carrier is None and (set(saved) - HEADS or (saved and lost)):
        raise RecipeError(
            f"what is trained besides, {', '.join(saved)}, is kept with a delta, and "
            f"`{recipe.deltas[0].type}` keeps none",
            hint="put another delta beside it, as bitfit",
        )
    if recipe.merge and carrier is None:
        raise RecipeError(
            f"merge: `{recipe.deltas[0].type}` has no place in the weights", hint="leave merge out"
        )
    modules, stacked = modules_of_model(base.model), stacked_of_model(base.model)
    torch.manual_seed(recipe.seed)
    found: dict[str, Any] = {}
    for number, (name, spec) in enumerate(zip(called, recipe.deltas, strict=True)):
        own, besides = addressed(spec, modules)
        place = Place(
            own,
            besides,
            parameters_addressed(spec, modules, stacked),
            task_type=goal.task_type,
            modules_to_save=saved if number == carrier else (),
            tokenizer=tokenizer,
            tokenizer_path=str(job.checkpoint),
            hidden=int(base.model.config.get_text_config().hidden_size),
        )
        with LibraryRefusal(f"deltas.{number}: PEFT refuses it", error=RecipeError):
            found[name] = METHODS[spec.type](spec, place)
    with LibraryRefusal("deltas: PEFT refuses them on this model", error=RecipeError):
        model = compose.attach(base.model, found)
    if recipe.merge:
        require_mergeable(model)
    return model, called


HEADS = {"classifier", "score"}
"""What PEFT keeps with a prompt or prefix by itself."""
