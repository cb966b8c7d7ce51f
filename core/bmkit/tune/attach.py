"""Put a recipe's deltas on a model."""

from __future__ import annotations

from typing import Any

from bmkit.deltas import attachment
from bmkit.deltas.attachment import METHODS
from bmkit.deltas.merge import require_mergeable
from bmkit.deltas.recipe import names
from bmkit.errors import RecipeError
from bmkit.plan import Job
from bmkit.tune.base import Base, unfrozen
from bmkit.tune.objectives import Objective
from bmkit.tune.recipe import TuneRecipe

__all__ = ["METHODS", "attach"]


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
    carrier = attachment.carrier(recipe.deltas)
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
    model = attachment.attach(
        base.model,
        dict(zip(called, recipe.deltas, strict=True)),
        seed=recipe.seed,
        tokenizer=tokenizer,
        tokenizer_path=job.checkpoint,
        task_type=goal.task_type,
        saved=saved,
        tokens=() if goal.marks is None else goal.marks.trained,
    )
    if recipe.merge:
        require_mergeable(model)
    return model, called


HEADS = {"classifier", "score"}
"""What PEFT keeps with a prompt or prefix by itself."""
