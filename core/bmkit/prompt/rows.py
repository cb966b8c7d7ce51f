"""The rows of a recipe: read by its columns, with their labels. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bmkit.data import classes
from bmkit.data.classes import Classes
from bmkit.data.columns import read_rows
from bmkit.data.tabular import Record
from bmkit.errors import RecipeError
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompt.tagging import Place, Tagger
from bmkit.prompt.tasks import WITHOUT_LABELS

LABEL = "label"
ANSWERS = (LABEL, "tags", "object", "target")
"""Columns of what is to be told: rows of `infer` do without."""
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Split:
    """The rows of one file."""

    name: str
    records: list[Record]
    """One for each prompt."""
    whole: list[Record] = field(default_factory=list)
    """Of `task: tagging`: the rows as the file has them."""
    places: list[Place] = field(default_factory=list)
    """Of `task: tagging`: which words of which row each prompt is about."""

    def labels(self, known: Classes, recipe: PromptRecipe) -> list[tuple[int, ...]]:
        """Return each row's labels. Raises InputError naming a row whose label is unknown."""
        if recipe.task == "tagging":
            return [(one,) for one in tagger(recipe, known).right(self.whole, self.places)]
        if recipe.task == "multilabel":
            separator = recipe.data.separator
            return [known.several(r, LABEL, separator=separator) for r in self.records]
        return [(known.number(r, LABEL),) for r in self.records]


def read(recipe: PromptRecipe, files: Mapping[str, Path]) -> dict[str, Split]:
    """Return the splits of a recipe. Raises InputError naming file, line and column."""
    data = recipe.data
    found = {}
    for name in SPLITS:
        if (path := files.get(f"data.{name}")) is not None:
            records = read_rows(
                path,
                data.columns,
                header=data.header,
                quoted=data.quoted,
                optional=ANSWERS if name == "train" else (),
            )
            classes.require_rows(records, f"data.{name}: {path}")
            found[name] = Split(name, records)
            if recipe.task == "tagging":
                found[name] = _spread(recipe, found[name])
    return found


def tagger(recipe: PromptRecipe, known: Classes) -> Tagger:
    """Return what makes prompts of rows of words."""
    return Tagger(recipe.tagging, known, recipe.data.none)


def _spread(recipe: PromptRecipe, split: Split) -> Split:
    """Return a split with a row for each prompt; of train, those that are learned from."""
    assert recipe.labels is not None  # the recipe names them
    own = tagger(recipe, Classes.of(recipe.data.labels or recipe.labels))
    places = own.places(split.records)
    if split.name == "train" and recipe.learning_setting.type != "zero_shot":
        right = own.right(split.records, places)
        places = [places[at] for at in own.sampled(places, right, recipe.seed)]
    return Split(split.name, own.records(split.records, places), split.records, places)


def labels_of(recipe: PromptRecipe, splits: Mapping[str, Split]) -> Classes:
    """Return the labels that the recipe names, else those that the rows have.

    Raises InputError if there is one alone, RecipeError if nothing tells them.
    """
    if recipe.task in WITHOUT_LABELS:
        return Classes((), {})
    if recipe.data.labels is not None:
        known = Classes.of(recipe.data.labels)
    elif recipe.labels is not None:
        known = Classes.of(recipe.labels)
    else:
        labelled = [r for s in splits.values() for r in s.records if LABEL in r.values]
        if not labelled:
            raise RecipeError("data.labels: nothing says which labels there are")
        known = Classes.found(labelled, LABEL)
    classes.require_classes(known)
    return known


def all_of(splits: Mapping[str, Split], order: Sequence[str]) -> Split | None:
    """Return the first of the splits that is there, in this order."""
    return next((splits[name] for name in order if name in splits), None)
