"""What a prompt recipe says of searching a template and words. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, model_validator

from bmkit.prompt.pointing import PointingAt
from bmkit.prompting import forms, template
from bmkit.recipe import Model, contradiction

if TYPE_CHECKING:
    from bmkit.prompt.recipe import PromptRecipe


class Search(Model):
    """Which templates and label words are tried, beside those of `template` and `verbalizer`."""

    templates: list[str] = Field(default=[], description="Further templates.")
    model: str | None = Field(
        default=None,
        description="A seq2seq model with sentinels (T5) that writes templates around the mask, "
        "from rows with their label's first word (LM-BFF, arXiv 2012.15723).",
    )
    forms: list[str] = Field(
        default=[],
        description='Where it writes: templates with gaps `{"special": "<extra_id_0>"}`, …; if not '
        "given, before and behind the mask, with the row's text before or behind that.",
    )
    beam_width: int = Field(default=30, ge=1, description="How many texts it goes on with.")
    max_new_tokens: int = Field(
        default=20, ge=1, description="Tokens that it writes for a template, ends of gaps included."
    )
    num_templates: int = Field(
        default=10, ge=1, description="How many of its templates are tried, the likeliest."
    )
    label_words: dict[str, str | list[str | list[str]]] = Field(
        default={},
        description="Further candidates of labels: words, or lists of words that go together.",
    )
    num_candidates: int = Field(
        default=30,
        ge=0,
        description="So many tokens for each label, the likeliest at the mask over its rows, are "
        "candidates as well.",
    )
    max_combinations: int = Field(
        default=100_000,
        ge=1,
        description="If there are more combinations of candidates, labels get theirs one after the "
        "other, and the best go on.",
    )
    num_combinations: int = Field(
        default=100,
        ge=1,
        description="Of each template: how many combinations, the best on train, are tried on dev.",
    )
    num_trained: int = Field(
        default=1,
        ge=1,
        description="With something to train: how many pairs of template and words are trained, of "
        "which the best on dev is kept.",
    )
    folds: int = Field(
        default=4, ge=2, description="Without dev: parts of train, each of which is held out once."
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> Search:
        for key, texts, parse in (
            ("templates", self.templates, _template),
            ("forms", self.forms, forms.parse),
        ):
            for number, text in enumerate(texts):
                with PointingAt(f"{key}.{number}"):
                    parse(text, f"{key}.{number}")
        if self.forms and self.model is None:
            raise contradiction("forms", "nothing writes in them without `model`")
        for label, own in self.label_words.items():
            for some in listed(own):
                words = listed(some)
                if not words or not all(word.strip() for word in words):
                    raise contradiction("label_words", f"`{label}` has an empty candidate")
        return self


T = TypeVar("T")


def listed(given: str | list[T]) -> list[T | str]:
    """Return a list as it is, and a text as one of one."""
    return [given] if isinstance(given, str) else [*given]


def _template(text: str, where: str) -> object:
    return template.parse(text, where).require_mask()


def check(recipe: PromptRecipe) -> None:
    """Raise what a validator raises if a recipe's search doesn't go with what else it says."""
    spec, words = recipe.search, recipe.verbalizer
    if recipe.template.choice == "all" and spec is None:
        raise contradiction("template.choice", "`all` takes a `search`, that chooses one of them")
    if spec is None:
        return
    if words.type not in ("manual", "one_to_one"):
        raise contradiction("search", f"a `{words.type}` verbalizer finds its own: take manual")
    if words.multi_token_handler == "likelihood":
        raise contradiction(
            "verbalizer.multi_token_handler",
            "`likelihood` asks anew for each word, and a search asks once: take first or mean",
        )
    if recipe.task != "classification":
        raise contradiction("task", "a search wants rows of one label")
    if recipe.tune.mode == "soft":
        raise contradiction("tune.mode", "soft tokens aren't searched: take delta or none")
    if recipe.tune.mode == "none" and spec.num_trained > 1:
        raise contradiction("search.num_trained", "nothing is trained with `tune.mode: none`")
    if spec.num_trained > 1 and recipe.data.dev is None and recipe.learning_setting.type == "full":
        raise contradiction("search.num_trained", "nothing tells the best one without data.dev")
    more = spec.templates or spec.model or recipe.template.choice == "all"
    if not (more or spec.label_words or spec.num_candidates):
        raise contradiction(
            "search", "there is nothing to choose from: give templates, model or label_words"
        )
    known = recipe.labels
    for label in spec.label_words:
        if known is not None and label not in known:
            raise contradiction(
                "search.label_words",
                f"`{label}` is none of the labels; there are {', '.join(known)}",
            )
