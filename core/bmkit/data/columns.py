"""Rows under the names that a template uses, whatever their file calls its columns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmkit.data.tabular import Record, read_table
from bmkit.errors import InputError, RecipeError, did_you_mean

Columns = Mapping[str, str | int]
"""Our name -> the file's: a column, a number counted from 0, or a path into a nested row."""

EACH = "*"
_MISSING = object()


def read_rows(
    path: Path,
    columns: Columns | None = None,
    *,
    header: bool | None = None,
    quoted: bool | None = None,
    optional: Collection[str] = (),
) -> list[Record]:
    """Read a file of rows (see `read_table`) and rename its columns (see `map_columns`).

    A CSV or TSV without a header has numbers for columns: `header` says whether it has one, and is
    false by default if all of `columns` are numbers. Raises InputError naming the file, the line
    and the column; RecipeError for `columns` that contradict each other.
    """
    wanted = dict(columns or {})
    _require_columns(wanted)
    if header is None:
        header = not wanted or any(isinstance(column, str) for column in wanted.values())
    table = read_table(path, header=header, quoted=quoted)
    keep = table.named or not wanted
    return [
        row
        for record in table.records
        for row in map_columns(record, wanted, keep=keep, optional=optional)
    ]


def map_columns(
    record: Record,
    columns: Columns,
    *,
    keep: bool = True,
    optional: Collection[str] = (),
    ours_too: bool = False,
) -> Iterator[Record]:
    """Yield a row under our names, or several where a column leads into each item of a list.

    `columns` maps our names (`text_a`, `label`, `meta.word`, any) to the file's. `meta.word`
    becomes the key `word` of `meta`. In JSON, `passage.text` and `choices.0` lead into nested
    values, and `answers.*.text` makes a row of each item of a list. Columns that aren't named keep
    their own names, unless one of ours takes it, or aren't kept without `keep`. Those in `optional`
    may be missing. With `ours_too` a row may have our name in the place of a column that it lacks,
    or of a number, as rows have that people write for a table without a header; a number is a
    column's name then, and not its place. Raises InputError naming the row and the column.
    """
    paths: dict[str, str] = {}
    for ours, column in columns.items():
        if ours_too and _is_ours(record, ours, column):
            paths[ours] = ours
        elif ours_too and isinstance(column, int) and str(column) in record.values:
            paths[ours] = str(column)
        elif ours_too and isinstance(column, int):
            if ours not in optional:
                hint = _offer(ours, record.values)
                raise InputError(f"{record.where}: it has no `{ours}`", hint=hint)
        elif not (ours in optional and _beyond(record, column)):
            paths[ours] = _path(record, ours, column)
    for found in _unfold(record.values, paths):
        values: dict[str, Any] = dict(record.values) if keep else {}
        meta: dict[str, Any] = {}
        for ours, path in found.items():
            value = _lookup(record.values, path)
            if value is _MISSING and ours in optional:
                continue
            if value is _MISSING:
                raise InputError(
                    f"{record.where}: it has no column `{path}`, which is to be `{ours}`",
                    hint=_offer(path, record.values),
                )
            key = ours.removeprefix("meta.")
            (values if key == ours else meta)[key] = value
        if meta:
            kept = values.get("meta")
            values["meta"] = {**(kept if isinstance(kept, dict) else {}), **meta}
        yield replace(record, values=values)


def _require_columns(columns: Columns) -> None:
    for ours in columns:
        if ours == "meta" and any(other.startswith("meta.") for other in columns):
            raise RecipeError("data.columns: `meta` and `meta.…` can't both be columns")
        if ours == "meta." or not ours:
            raise RecipeError(f"data.columns: `{ours}` is no name")


def _is_ours(record: Record, ours: str, column: str | int) -> bool:
    start = str(column).partition(f".{EACH}")[0]
    lacks = isinstance(column, int) or _lookup(record.values, start) is _MISSING
    return lacks and _lookup(record.values, ours) is not _MISSING


def _beyond(record: Record, column: str | int) -> bool:
    return isinstance(column, int) and not 0 <= column < len(record.values)


def _path(record: Record, ours: str, column: str | int) -> str:
    """Return a column's name; that of a number, by its place in the row."""
    if isinstance(column, str):
        return column
    if _beyond(record, column):
        raise InputError(
            f"{record.where}: it has no column {column}, which is to be `{ours}`",
            hint=f"there are {len(record.values)}, counted from 0",
        )
    return list(record.values)[column]


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
