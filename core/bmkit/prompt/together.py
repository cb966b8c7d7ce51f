"""What a prompt recipe says of prompts that tell labels together. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from bmkit.recipe import Model, contradiction


class Together(Model):
    """How several prompts tell labels together (PET, arXiv 2001.07676)."""

    weights: Literal["equal", "dev_accuracy", "untrained_accuracy"] = Field(
        default="equal",
        description="How much each of them counts: alike, by its accuracy on dev, or as in PET by "
        "that on the rows of train before it is trained.",
    )
    aggregate: Literal["probabilities", "logarithms"] = Field(
        default="probabilities",
        description="Labels have the mean of what each of them says: of which of both.",
    )


def require_members(recipe: Any) -> None:
    """Raise a fault of the recipe's `ensemble`, if it has one; of a member, the first of its own.

    `recipe` is a PromptRecipe.
    """
    ensemble, setting = recipe.ensemble, recipe.learning_setting
    if (1 + len(ensemble.members)) * max(len(setting.seeds), 1) < 2:
        raise contradiction("ensemble", "one prompt is none: name members, or several seeds")
    held_out = recipe.data.dev is not None or setting.type == "few_shot"
    if ensemble.weights == "dev_accuracy" and not held_out:
        raise contradiction("ensemble.weights", "`dev_accuracy` needs data.dev")
    if ensemble.weights == "untrained_accuracy" and setting.type == "zero_shot":
        raise contradiction("ensemble.weights", "`untrained_accuracy` needs rows to learn from")
    for number, member in enumerate(ensemble.members):
        key = f"ensemble.members.{number}"
        if member.template.file_path or (member.verbalizer and member.verbalizer.file_path):
            raise contradiction(key, "`file_path`: a member says its template and words itself")
        try:
            type(recipe).model_validate(recipe.model_dump() | recipe.member(number + 1))
        except ValidationError as exc:
            problem = exc.errors(include_url=False)[0]
            at = problem.get("ctx", {}).get("key") or ".".join(map(str, problem["loc"]))
            raise contradiction(key, f"{at}: {problem['msg']}") from None
