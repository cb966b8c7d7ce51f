"""Rows under the names that a template uses, whatever their file calls its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmkit.data.tabular import Record, Table, read_table
from bmkit.errors import InputError, RecipeError, did_you_mean

Columns = Mapping[str, str | int]
"""Our name -> the file's: a column, a number counted from 0, or a path into a nested row."""

EACH = "*"
_MISSING = object()


def read_rows(
    path: Path, columns: Columns | None = None, *, header: bool | None = None, **table: Any
) -> list[Record]:
    """Read a file of rows (see `read_table`) and rename its columns.

    `columns` maps our names (`text_a`, `label`, `meta.word`, any) to the file's. `meta.word`
    becomes the key `word` of `meta`. In JSON, `passage.text` and `choices.0` lead into nested
    values, and `answers.*.text` makes a row of each item of a list. Columns that aren't named keep
    their own names, unless one of ours takes it. A CSV or TSV without a header has numbers for
    columns: `header` says whether it has one, and is false by default if all of `columns` are
    numbers. Raises InputError naming the file, the line and the column; RecipeError for
    `columns` that contradict each other.
    """
    wanted = dict(columns or {})
    _require_columns(wanted)
    numbers = [name for name, column in wanted.items() if isinstance(column, int)]
    if header is None:
        header = not numbers or len(numbers) < len(wanted)
    table_ = read_table(path, header=header, **table)
    return [mapped for record in table_.records for mapped in map_columns(record, wanted, table_)]


def map_columns(record: Record, columns: Columns, table: Table | None = None) -> Iterator[Record]:
    """Yield a row under our names, or several where a column leads into each item of a list."""
    own = record.values if table is None or table.named or not columns else {}
    names = list(record.values)
    paths = {
        ours: _by_number(record, ours, column, names) if isinstance(column, int) else column
        for ours, column in columns.items()
    }
    for found in _unfold(record.values, paths):
        values: dict[str, Any] = dict(own)
        meta: dict[str, Any] = {}
        for ours, path in found.items():
            value = _lookup(record.values, path)
            if value is _MISSING:
                raise InputError(
                    f"{record.where}: it has no column `{path}`, which is to be `{ours}`",
                    hint=_offer(path, record.values),
                )
            key = ours.removeprefix("meta.")
            (values if key == ours else meta)[key] = value
        if meta:
            kept = own.get("meta")
            values["meta"] = {**(kept if isinstance(kept, dict) else {}), **meta}
        yield replace(record, values=values)


def _require_columns(columns: Columns) -> None:
    for ours in columns:
        if ours == "meta" and any(other.startswith("meta.") for other in columns):
            raise RecipeError("data.columns: `meta` and `meta.…` can't both be columns")
        if ours == "meta." or not ours:
            raise RecipeError(f"data.columns: `{ours}` is no name")


def _by_number(record: Record, ours: str, number: int, names: list[str]) -> str:
    if not 0 <= number < len(names):
        raise InputError(
            f"{record.where}: it has no column {number}, which is to be `{ours}`",
            hint=f"there are {len(names)}, counted from 0",
        )
    return names[number]


def _lookup(values: Any, path: str) -> Any:
    """Return what `path` leads to. A key that holds a dot goes first."""
    if isinstance(values, dict):
        if path in values:
            return values[path]
        for at in (i for i, c in enumerate(path) if c == "."):
            if path[:at] in values:
                found = _lookup(values[path[:at]], path[at + 1 :])
                if found is not _MISSING:
                    return found
    elif isinstance(values, list):
        step, dot, rest = path.partition(".")
        if step.isascii() and step.isdigit() and int(step) < len(values):
            return _lookup(values[int(step)], rest) if dot else values[int(step)]
    return _MISSING


def _unfold(values: Any, paths: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield `paths` for each item that their first `*` stands for; of two lists, each pair."""
    star = next((p for p in paths.values() if EACH in p.split(".") and not _literal(values, p)), "")
    if not star:
        yield paths
        return
    steps = star.split(".")
    prefix = ".".join(steps[: steps.index(EACH)])
    items = _lookup(values, prefix) if prefix else values
    if not isinstance(items, list):
        yield paths  # said to be missing, by who looks it up
        return
    for number in range(len(items)):
        yield from _unfold(
            values, {ours: _numbered(path, prefix, number) for ours, path in paths.items()}
        )


def _literal(values: Any, path: str) -> bool:
    return isinstance(values, dict) and path in values


def _numbered(path: str, prefix: str, number: int) -> str:
    start = f"{prefix}.{EACH}"
    if path == start or path.startswith(f"{start}."):
        return f"{prefix}.{number}{path[len(start) :]}"
    return path


def _offer(path: str, values: dict[str, Any]) -> str:
    there = list(_paths(values))
    close = did_you_mean(path, there)
    listed = ", ".join(f"`{name}`" for name in there[:20])
    more = f" and {len(there) - 20} more" if len(there) > 20 else ""
    return f"{close} There are {listed}{more}" if close else f"there are {listed}{more}"


def _paths(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from _paths(value[0], f"{prefix}{key}.{EACH}.")
        else:
            yield f"{prefix}{key}"
