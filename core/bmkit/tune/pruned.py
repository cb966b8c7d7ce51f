"""A pruned model that is tuned: what is trained of it keeps its zeros, and so does a merge."""

from __future__ import annotations

from typing import Any

from bmkit.deltas.masked import Masks, mask_updates
from bmkit.errors import RecipeError
from bmkit.nn.zeros import is_pruned, keep_zeros
from bmkit.tune.recipe import TuneRecipe

FILLS = ("adalora", "boft", "oft", "vera")
"""Methods whose merge fills zeros, and that aren't trained not to."""


def keep_pruned(recipe: TuneRecipe, model: Any) -> Masks:
    """Let a pruned model's zeros stay, in weights that are trained and, with `merge`, by updates.

    Raises RecipeError for a method whose merge would fill them.
    """
    whole = not recipe.deltas
    own = [p for n, p in model.named_parameters() if whole or ".modules_to_save." in n]
    keep_zeros(own)
    if not recipe.merge or whole:
        return Masks()
    if not any(is_pruned(p) for n, p in model.named_parameters() if not p.requires_grad):
        return Masks()
    for spec in recipe.deltas:
        plain = spec.type != "lora" or not (
            spec.use_dora or spec.lora_dropout or spec.target_parameters
        )
        if spec.type in FILLS or not plain or getattr(spec, "init_lora_weights", "")[:5] in _OWN:
            raise RecipeError(
                f"merge: the model is pruned, and `{spec.type}` as it is here would fill its zeros",
                hint="plain lora without dropout keeps them; or keep the delta beside the model",
            )
    return mask_updates(model)


_OWN = ("pissa", "olora")
