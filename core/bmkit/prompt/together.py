"""What a prompt recipe says of prompts that tell labels together. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from bmkit.prompt.templatespec import TemplateSpec
from bmkit.prompt.verbalizerspec import VerbalizerSpec
from bmkit.recipe import Model, contradiction

if TYPE_CHECKING:
    from bmkit.prompt.recipe import PromptRecipe

TASKS = ("classification", "multilabel", "relation")
"""Those whose labels several prompts tell together."""


class Member(Model):
    """A further prompt of an ensemble: the recipe's, but for these."""

    template: TemplateSpec = Field(description="Its template, with the keys of `template`.")
    verbalizer: VerbalizerSpec | None = Field(
        default=None, description="With the keys of `verbalizer`, which it is if not given."
    )


class Ensemble(Model):
    """Prompts that tell labels together (PET, arXiv 2001.07676).

    The recipe's own and its `members`, one for each seed.
    """

    members: list[Member] = Field(default=[], description="The others, beside the recipe's own.")
    weights: Literal["equal", "dev_accuracy", "untrained_accuracy"] = Field(
        default="equal",
        description="How much each of them counts: alike, by its accuracy on dev, or as in PET by "
        "that on the rows of train before it is trained.",
    )
    aggregate: Literal["probabilities", "logarithms"] = Field(
        default="probabilities",
        description="Labels have the mean of what each of them says: of which of both.",
    )


def require_together(recipe: PromptRecipe) -> None:
    """Raise a fault of the recipe's `ensemble`, if any; of a member, the first of its own."""
    if recipe.data.unlabelled is not None and recipe.task not in ("classification", "relation"):
        raise contradiction("data.unlabelled", f"`task: {recipe.task}` teaches no classifier")
    if recipe.ensemble is None:
        return
    if recipe.task not in TASKS:
        raise contradiction("ensemble", f"`task: {recipe.task}` takes one prompt, and no ensemble")
    ensemble, setting = recipe.ensemble, recipe.learning_setting
    if (1 + len(ensemble.members)) * max(len(setting.seeds), 1) < 2:
        raise contradiction("ensemble", "one prompt is none: name members, or several seeds")
    held_out = recipe.data.dev is not None or setting.type == "few_shot"
    if ensemble.weights == "dev_accuracy" and not held_out:
        raise contradiction("ensemble.weights", "`dev_accuracy` needs data.dev")
    if ensemble.weights == "untrained_accuracy" and setting.type == "zero_shot":
        raise contradiction(
            "ensemble.weights",
            "`untrained_accuracy` needs rows to learn from: learning_setting.type few_shot or full",
        )
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
