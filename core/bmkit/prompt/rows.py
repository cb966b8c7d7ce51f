"""The rows of a recipe: read by its columns, with their labels. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bmkit.data import classes
from bmkit.data.classes import Classes
from bmkit.data.columns import read_rows
from bmkit.data.tabular import Record
from bmkit.errors import RecipeError
from bmkit.prompt.recipe import PromptRecipe

LABEL = "label"
SPLITS = ("train", "dev", "test", "unlabelled")


@dataclass(frozen=True)
class Split:
    """The rows of one file."""

    name: str
    records: list[Record]

    def labels(self, known: Classes, recipe: PromptRecipe) -> list[tuple[int, ...]]:
        """Return each row's labels. Raises InputError naming a row whose label is unknown."""
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
                optional=(LABEL,) if name in ("train", "unlabelled") else (),
            )
            classes.require_rows(records, f"data.{name}: {path}")
            found[name] = Split(name, records)
    return found


def labels_of(recipe: PromptRecipe, splits: Mapping[str, Split]) -> Classes:
    """Return the labels that the recipe names, else those that the rows have.

    Raises InputError if there is one alone, RecipeError if nothing tells them.
    """
    if recipe.data.labels is not None:
        known = Classes.of(recipe.data.labels)
    elif recipe.labels is not None:
        known = Classes.of(recipe.labels)
    else:
        told = [split for name, split in splits.items() if name != "unlabelled"]
        labelled = [r for s in told for r in s.records if LABEL in r.values]
        if not labelled:
            raise RecipeError("data.labels: nothing says which labels there are")
        known = Classes.found(labelled, LABEL)
    classes.require_classes(known)
    return known


def all_of(splits: Mapping[str, Split], order: Sequence[str]) -> Split | None:
    """Return the first of the splits that is there, in this order."""
    return next((splits[name] for name in order if name in splits), None)
