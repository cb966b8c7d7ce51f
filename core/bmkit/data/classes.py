"""The labels of a task: their names and order, and what a file writes for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmkit.data.tabular import Record
from bmkit.errors import InputError, RecipeError, did_you_mean


@dataclass(frozen=True)
class Classes:
    """The labels of a task in their order, and the number of each value that a file may hold."""

    names: tuple[str, ...]
    numbers: Mapping[str, int]

    @classmethod
    def of(cls, labels: Sequence[str] | Mapping[str, str]) -> Classes:
        """Return the labels that a recipe names.

        A list names them in their order, and a file holds these names or, if no name is a number,
        their places, from 0. A mapping leads from what the file holds to names, in the order in
        which names first appear; several values may mean one label. Raises RecipeError if a list
        names a label twice or there is none.
        """
        if isinstance(labels, Mapping):
            names = tuple(dict.fromkeys(labels.values()))
            numbers = {value: names.index(name) for value, name in labels.items()}
        else:
            names = tuple(labels)
            numbers = {name: number for number, name in enumerate(names)}
            if len(numbers) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise RecipeError(f"data.labels: `{twice}` is named twice")
            if not any(_is_number(name) for name in names):
                numbers |= {str(number): number for number in range(len(names))}
        if not names:
            raise RecipeError("data.labels: it names no label")
        return cls(names, numbers)

    @classmethod
    def found(cls, records: Iterable[Record], column: str = "label") -> Classes:
        """Return the labels that rows hold: numbers by size, then the others by the alphabet."""
        held = {text for record in records for text in _texts(record, column)}
        names = sorted(held, key=lambda n: (0, int(n), n) if _is_number(n) else (1, 0, n))
        return cls(tuple(names), {name: number for number, name in enumerate(names)})

    def __len__(self) -> int:
        return len(self.names)

    def number(self, record: Record, column: str = "label") -> int:
        """Return a row's label. Raises InputError naming the row if it has none, or several."""
        numbers = self.several(record, column)
        if len(numbers) != 1:
            held = "no label" if not numbers else f"{len(numbers)} labels"
            raise InputError(
                f"{record.where}: `{column}` holds {held}, and a row has one",
                hint="task: multilabel takes rows of several",
            )
        return numbers[0]

    def several(
        self, record: Record, column: str = "label", *, separator: str | None = None
    ) -> tuple[int, ...]:
        """Return a row's labels in their order, each once: `column` holds one or a list of them.

        Text is split at `separator`, if it is given. Raises InputError naming the row and the
        known labels.
        """
        texts = _texts(record, column, separator)
        for text in texts:
            if text not in self.numbers:
                known = ", ".join(f"`{value}`" for value in self._shown())
                raise InputError(
                    f"{record.where}: `{text}` is none of the labels",
                    hint=did_you_mean(text, self._shown(), otherwise=f"there are {known}"),
                )
        return tuple(sorted({self.numbers[text] for text in texts}))

    def _shown(self) -> list[str]:
        """Return what a file may hold, without the places of names."""
        plain = all(name in self.numbers for name in self.names)
        return list(self.names) if plain else list(self.numbers)


def require_rows(records: Sequence[Any], what: str) -> None:
    """Raise InputError if there are no rows; `what` names where they should have been."""
    if not records:
        raise InputError(f"{what} is empty", hint="it takes one row at least")


def require_classes(classes: Classes, what: str = "data.labels") -> None:
    """Raise InputError if there is one label only, so that nothing can be told apart."""
    if len(classes) < 2:
        raise InputError(
            f"{what} has one label only, `{classes.names[0]}`: there is nothing to tell apart",
            hint="name all of them in data.labels",
        )


def require_every_class(
    labels: Iterable[int | Collection[int]], classes: Classes, what: str
) -> None:
    """Raise InputError if a label has no row; it tells how many each has."""
    counts = count(labels, classes)
    if missing := [name for name, rows in counts.items() if not rows]:
        raise InputError(
            f"{what} has no row of {listed(missing)}: {counted(counts)}",
            hint="add rows of it, or leave the label out",
        )


def count(labels: Iterable[int | Collection[int]], classes: Classes) -> dict[str, int]:
    """Return how many rows each label has; a row of several counts for each."""
    counts = Counter(n for label in labels for n in numbers_of(label))
    return {name: counts[number] for number, name in enumerate(classes.names)}


def numbers_of(label: int | Collection[int]) -> Collection[int]:
    """Return a row's label or labels as a collection."""
    return (label,) if isinstance(label, int) else label


def counted(counts: Mapping[str, int]) -> str:
    """Say how many rows each label has."""
    return ", ".join(f"`{name}` has {rows}" for name, rows in counts.items())


def listed(names: Iterable[str]) -> str:
    """Return names in backticks, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def _texts(record: Record, column: str, separator: str | None = None) -> list[str]:
    if column not in record.values:
        there = list(record.values)
        close = did_you_mean(column, there, otherwise=f"there are {listed(there)};")
        raise InputError(
            f"{record.where}: it has no column `{column}`",
            hint=f"{close} data.columns says which one it is",
        )
    value = record.values[column]
    if isinstance(value, str) and separator is not None:
        value = [part for part in value.split(separator) if part.strip()]
    return [_text(record, column, v) for v in (value if isinstance(value, list) else [value])]


def _text(record: Record, column: str, value: Any) -> str:
    """Return a label as text: booleans as JSON writes them, text without space around it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int) and str(value).strip():
        return str(value).strip()
    held = "nothing" if value is None or value == "" else f"`{value}`"
    raise InputError(
        f"{record.where}: `{column}` holds {held}, which is no label",
        hint="a label is text, a whole number, true or false",
    )


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
