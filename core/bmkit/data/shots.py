"""A few rows of each label, drawn for few-shot learning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from itertools import islice

from bmkit.data.classes import Classes, count, counted, numbers_of
from bmkit.data.tabular import Record
from bmkit.errors import InputError, RecipeError

Label = int | Collection[int]


def sample(
    rows: Sequence[Record],
    labels: Sequence[Label],
    classes: Classes,
    *,
    per_label: int | None = None,
    total: int | None = None,
    seed: int = 0,
    dev_like: bool = True,
) -> tuple[list[int], list[int]]:
    """Draw `per_label` rows of each label, or `total` rows of any, and as many others for dev.

    Returns places in `rows`, in the order of the draw, labels mixed; without `dev_like` dev is
    empty. A row's place in the draw is a hash of `seed` and its content, so the order of rows
    doesn't matter, and another row in the file changes little. Rows that are alike are drawn once,
    so none of train comes again in dev. A row of several labels counts for each of them.
    Raises InputError telling how many rows each label has, if these are too few.
    """
    if (per_label is None) == (total is None):
        raise RecipeError("a sample takes a number of rows for each label, or of all: one of them")
    wanted = total if per_label is None else per_label
    if not wanted or wanted < 1:
        raise RecipeError("a sample takes one row at least")
    left = order = _order(rows, seed)
    parts: list[list[int]] = []
    for _ in range(2 if dev_like else 1):
        drawn = set(left[:total]) if per_label is None else _each(left, labels, classes, per_label)
        if per_label is None:
            enough = len(drawn) == total
        else:
            enough = min(count((labels[at] for at in drawn), classes).values()) >= per_label
        if not enough:
            there = counted(count((labels[at] for at in order), classes))
            each = "" if per_label is None else " of each label"
            twice = ", and as many for dev" if dev_like else ""
            raise InputError(
                f"there are too few rows for {wanted}{each}{twice}: {there}",
                hint="take fewer, or add rows; rows that are alike count once",
            )
        parts.append([at for at in left if at in drawn])
        left = [at for at in left if at not in drawn]
    return parts[0], parts[1] if dev_like else []


def _order(rows: Sequence[Record], seed: int) -> list[int]:
    """Return the places of all rows that differ, shuffled by `seed` and their content."""
    first: dict[bytes, int] = {}
    for at, row in enumerate(rows):
        content = json.dumps([seed, row.values], sort_keys=True, default=str)
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first.setdefault(digest, at)
    return [first[digest] for digest in sorted(first)]


def _each(
    left: Sequence[int], labels: Sequence[Label], classes: Classes, per_label: int
) -> set[int]:
    """Draw the first rows that are left until each label has its number, or has no more."""
    drawn: set[int] = set()
    for number in range(len(classes)):
        own = [at for at in left if number in numbers_of(labels[at])]
        missing = per_label - len(drawn.intersection(own))
        drawn |= set(islice((at for at in own if at not in drawn), max(missing, 0)))
    return drawn
