"""What a recipe says of its task besides labels, and what goes with it. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bmkit.recipe import Model, contradiction

if TYPE_CHECKING:
    from bmkit.prompt.recipe import PromptRecipe

Task = Literal["classification", "multilabel", "relation", "tagging", "probing", "generation"]
WITHOUT_LABELS = ("probing", "generation")
OF_ENTITIES = ("relation", "tagging")
ENTITIES = ("head", "tail")
"""The two of a relation, in a row."""


class Tagging(Model):
    """Of `task: tagging`: what a prompt is made of each row for."""

    unit: Literal["spans", "tokens"] = Field(
        default="spans",
        description="`spans`: each run of words, of which the likeliest that don't overlap are "
        "kept (TemplateNER, arXiv 2106.01760); `tokens`: each word.",
    )
    max_words: int = Field(default=8, ge=1, description="Of `spans`: words of a run at most.")
    negatives: float = Field(
        default=1.5,
        ge=0,
        description="Of `spans`: so many runs that are nothing are learned from for each that is "
        "something.",
    )


class Probing(Model):
    """Of `task: probing`: what may be the answer."""

    candidates: list[str] | None = Field(
        default=None,
        min_length=2,
        description="Words of any number of tokens; without them, each token of the vocabulary.",
    )
    candidates_file: str | None = Field(
        default=None, description="A file with a candidate on each line."
    )
    prefix: str = Field(default=" ", description="What is before each candidate and object.")
    combine: Literal["sum", "mean"] = Field(
        default="mean", description="Of candidates: the log-likelihood of all tokens, or by token."
    )
    top: int = Field(default=10, ge=1, description="How many answers `infer` writes.")


class Generate(Model):
    """Of `task: generation`: how answers are made that are measured."""

    max_new_tokens: int = Field(default=64, ge=1, description="Tokens of an answer at most.")
    stop_strings: list[str] = Field(default=[], description="Texts that end an answer.")
    min_new_tokens: int = Field(default=0, ge=0, description="Tokens of an answer at least.")


WHILE_TRAINED = ("dev_loss", "dev_accuracy", "dev_f1")
"""What is measured on dev while something is trained that tells labels."""


def longest(task: str, most: int, spec: Generate) -> int:
    """Return how many tokens a model has before it: `most` of a prompt, and what it may say."""
    return most + (spec.max_new_tokens if task == "generation" else 0)


def with_verbalizer(values: Any) -> Any:
    """Return a recipe's values with the verbalizer of tasks that have no labels."""
    if isinstance(values, dict) and values.get("task") in WITHOUT_LABELS:
        return {"verbalizer": {"type": "none"}, **values}
    return values


def require_task(recipe: PromptRecipe) -> None:
    """Refuse what a task doesn't go with. Raises PydanticCustomError that points at a key."""
    _require_keys_of(recipe)
    task, data, kind = recipe.task, recipe.data, recipe.verbalizer.type
    if (kind == "none") != (task in WITHOUT_LABELS):
        problem = "has no labels: leave the verbalizer out" if kind != "none" else "tells labels"
        raise contradiction("verbalizer.type", f"`task: {task}` {problem}")
    if task in WITHOUT_LABELS:
        _require_no_labels(recipe)
    elif recipe.train.metric_for_best_model not in (None, *WHILE_TRAINED):
        has = ", ".join(WHILE_TRAINED)
        raise contradiction("train.metric_for_best_model", f"`task: {task}` has {has}")
    if task == "tagging":
        if recipe.labels is None:
            raise contradiction("data.labels", "`task: tagging` takes them by name")
        if data.none is None and recipe.tagging.unit == "spans":
            raise contradiction("data.none", "`tagging` needs the label of spans that are nothing")
    if data.none is not None and recipe.labels is not None and data.none not in recipe.labels:
        raise contradiction("data.none", f"`{data.none}` is none of the labels")
    if recipe.task in OF_ENTITIES and recipe.verbalizer.type == "generation":
        raise contradiction("verbalizer.type", f"`task: {task}` has words for its labels")
    wanted = {"relation": ENTITIES, "tagging": ("span",), "probing": ()}.get(task, ())
    fields = _fields(recipe)
    if fields is not None and not set(wanted) <= set(fields):
        missing = next(name for name in wanted if name not in fields)
        what = "is about two entities" if task == "relation" else "is about words"
        raise contradiction(
            "template", f"`task: {task}` {what}, and the template has no `{missing}`"
        )


def _require_keys_of(recipe: PromptRecipe) -> None:
    """Refuse keys that say nothing with the recipe's task; a manifest says all, as by default."""
    said: dict[str, tuple[Model | str | None, tuple[str, ...]]] = {
        "data.none": (recipe.data.none, OF_ENTITIES),
        "probing": (recipe.probing, ("probing",)),
        "tagging": (recipe.tagging, ("tagging",)),
        "generate": (recipe.generate, ("generation",)),
    }
    for key, (held, tasks) in said.items():
        usual = held is None or (isinstance(held, Model) and held == type(held)())
        if not usual and recipe.task not in tasks:
            raise contradiction(key, f"it says nothing with `task: {recipe.task}`")
    if recipe.probing.candidates is not None and recipe.probing.candidates_file is not None:
        raise contradiction("probing.candidates_file", "it goes without `candidates`")


def _require_no_labels(recipe: PromptRecipe) -> None:
    task = recipe.task
    if recipe.data.labels is not None:
        raise contradiction("data.labels", f"`task: {task}` has none")
    if recipe.calibrate.type != "none":
        raise contradiction("calibrate.type", f"`task: {task}` has no labels to calibrate")
    if task == "probing" and recipe.tune.mode != "none":
        raise contradiction("tune.mode", "`task: probing` asks what a model knows: take none")
    if task == "generation" and recipe.learning_setting.num_examples_per_label is not None:
        raise contradiction(
            "learning_setting.num_examples_per_label", "there are no labels: num_examples_total"
        )
    if recipe.train.metric_for_best_model not in (None, "dev_loss"):
        raise contradiction("train.metric_for_best_model", f"`task: {task}` has dev_loss alone")


def _fields(recipe: PromptRecipe) -> tuple[str, ...] | None:
    """Return the template's names, if they can be seen in the recipe."""
    from bmkit.prompt import templates
    from bmkit.prompting.template import Template

    if recipe.template.file_path is not None:
        return None
    found = templates.parse(recipe.template.model_dump(include={"text", "jinja", "chat"}))
    return found.fields if isinstance(found, Template) else None
