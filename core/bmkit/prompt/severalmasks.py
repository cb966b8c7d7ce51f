"""What a recipe says of several masks, and whether its parts agree on them. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bmkit.errors import RecipeError
from bmkit.prompting.encode import Kind
from bmkit.prompting.generation import parse_rules
from bmkit.recipe import contradiction

if TYPE_CHECKING:
    from bmkit.prompt.recipe import PromptRecipe

Handler = Literal["first", "mean", "max", "likelihood"]


def require_masks(recipe: PromptRecipe) -> None:
    """Refuse label words that aren't one a mask, or what several masks don't go with.

    Raises PydanticCustomError that points at a key.
    """
    spec, words = recipe.verbalizer, recipe.verbalizer.label_words
    if spec.word_weights:
        _require_weights(recipe)
    if spec.type not in ("ptr", "generation"):
        return
    if recipe.task == "multilabel":
        raise contradiction("verbalizer.type", f"`{spec.type}` tells one label a row")
    if words is None:
        if spec.type == "generation":
            raise contradiction("verbalizer.file_path", "`generation` has rules in label_words")
        return  # they are in a file
    masks = template_masks(recipe)
    listed = list(words.values()) if isinstance(words, dict) else words
    names = list(words) if isinstance(words, dict) else [str(at) for at in range(len(words))]
    sizes = [1 if isinstance(own, str) else len(own) for own in listed]
    wanted = sizes[0] if masks is None else masks
    for name, size in zip(names, sizes, strict=True):
        if size != wanted:
            other = f"`{names[0]}` {wanted}" if masks is None else f"the template {wanted} masks"
            raise contradiction(
                "verbalizer.label_words",
                f"`{name}` has {size}, and {other}: a label takes one for each mask",
            )
    if spec.type == "generation":
        if recipe.calibrate.type != "none":
            raise contradiction(
                "calibrate.type", "`generation` has other texts in each row: nothing is alike"
            )
        try:
            parse_rules(dict(zip(names, listed, strict=True)), names)
        except RecipeError as exc:
            raise contradiction("verbalizer.label_words", str(exc)) from None


def _require_weights(recipe: PromptRecipe) -> None:
    key, spec = "verbalizer.word_weights", recipe.verbalizer
    if spec.type not in ("manual", "knowledgeable", "automatic"):
        raise contradiction(key, f"`{spec.type}` hasn't several words for a label")
    if recipe.tune.mode == "none":
        raise contradiction(key, "they are trained: take tune.mode soft or delta")
    if recipe.task == "multilabel":
        raise contradiction(key, "`task: multilabel` has the mean of a label's words")


def template_masks(recipe: PromptRecipe) -> int | None:
    """Return how many masks the template has, if that can be seen in the recipe."""
    from bmkit.prompt import templates
    from bmkit.prompting.template import Template

    spec = recipe.template
    if spec.file_path is not None:
        return None
    found = templates.parse(spec.model_dump(include={"text", "jinja", "chat"}))
    return found.masks if isinstance(found, Template) else None


def handler_of(recipe: PromptRecipe, kind: Kind, masks: int) -> Handler:
    """Return how words of several tokens count: by likelihood where masks are said in turn.

    That is so for texts of rows, and for all models but masked ones.

    Raises RecipeError for what a masked model can't do.
    """
    said, name = recipe.verbalizer.multi_token_handler, recipe.verbalizer.type
    if name == "generation" or (name == "ptr" and kind != "masked"):
        said = "likelihood"
    if kind == "masked" and said == "likelihood" and masks > 1:
        raise RecipeError(
            "verbalizer.multi_token_handler: a masked model reads several masks in one pass",
            hint="take first, mean or max, or a template with one mask",
        )
    return said
