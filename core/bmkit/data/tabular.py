"""Files of rows with columns: JSON lines, JSON lists, CSV and TSV, compressed by gzip or not."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bmkit.data import rows
from bmkit.errors import InputError

Layout = Literal["lines", "list", "csv", "tsv"]
LAYOUTS: dict[str, Layout] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
}
SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "valid", "validation", "validate", "val", "development"),
    "test": ("test", "testing"),
    "unlabelled": ("unlabelled", "unlabeled"),
}
"""What the files of a split may be called."""


@dataclass(frozen=True)
class Record:
    """One row: its values by column, and where it stands, as errors say it (`x.tsv:3`)."""

    where: str
    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A whole file: its rows, and whether its first line named the columns."""

    records: list[Record]
    named: bool


def split_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by split: `train`, `dev` (or `validation`, …) and `test`.

    Raises InputError if there is none, or if a split has two.
    """
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and _ending(p) in LAYOUTS):
        stem = path.name.partition(".")[0].lower()
        for split, names in SPLITS.items():
            if stem not in names:
                continue
            if split in found:
                raise InputError(
                    f"{folder} has two files for `{split}`: {found[split].name} and {path.name}",
                    hint="name the one that you mean",
                )
            found[split] = path
    if not found:
        raise InputError(
            f"{folder} holds no file of a split",
            hint=f"it takes train, dev or test with one of {', '.join(LAYOUTS)}",
        )
    return found


def read_table(path: Path, *, header: bool = True, quoted: bool | None = None) -> Table:
    """Read a file by its ending. Without `header` the columns of CSV and TSV are `0`, `1`, ….

    `quoted` says whether `"` encloses a value that holds a separator or a line end; otherwise it is
    a character like any other. By default that is so in CSV and not in TSV. Empty lines are passed
    over, and still counted. Raises InputError naming the file and the line.
    """
    layout = _layout(path)
    lines = _lines(path)
    if layout == "lines" and _ending(path) == ".json":
        content = list(lines)
        if b"".join(content[:64]).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return Table(_filled(path, _listed(path, b"".join(content))), named=True)
        lines = iter(content)
    if layout == "lines":
        return Table(_filled(path, _json_lines(path, lines)), named=True)
    separator = "," if layout == "csv" else "\t"
    quotes = layout == "csv" if quoted is None else quoted
    found = _cells(path, _decoded(path, lines), separator, quotes)
    return Table(_filled(path, _named(path, found, header)), named=header)


def is_table(path: Path) -> bool:
    """Tell whether a file is CSV or TSV, or compressed: what isn't read as a stream of rows."""
    return path.suffix == ".gz" or LAYOUTS.get(_ending(path)) in ("csv", "tsv")


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _layout(path: Path) -> Layout:
    if path.is_dir():
        raise InputError(f"{path} is a folder", hint="name one of its files")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if _ending(path) not in LAYOUTS:
        raise InputError(
            f"{path}: rows are read from {', '.join(LAYOUTS)}, each with .gz or without",
            hint="rename or convert it",
        )
    return LAYOUTS[_ending(path)]


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as plain:
            if path.suffix == ".gz":
                with gzip.open(plain) as stream:
                    yield from stream
            else:
                yield from plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
        raise InputError(f"{path} is not a whole gzip file: {exc}") from None


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}:{number}: it is not UTF-8 text") from None


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    for row in rows.read(lines):
        if isinstance(row, rows.BadRow):
            raise InputError(f"{path}:{row.line}: {row.problem}")
        yield Record(f"{path}:{row.line}", row.line, row.values)


def _listed(path: Path, content: bytes) -> Iterator[Record]:
    try:
        items = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: it is not UTF-8 text") from None
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: it is not JSON: {exc}") from None
    for number, item in enumerate(items, 1):
        where = f"{path}, row {number}"
        if not isinstance(item, dict):
            raise InputError(f"{where}: it is not a JSON object")
        yield Record(where, number, item)


def _cells(
    path: Path, lines: Iterator[str], separator: str, quotes: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line of each row that isn't empty, and its cells."""
    if not quotes:
        for number, line in enumerate(lines, 1):
            bare = line.rstrip("\r\n")
            if bare.strip():
                yield number, bare.split(separator)
        return
    reader = csv.reader(lines, delimiter=separator, strict=True)
    before = 0
    try:
        for cells in reader:
            if cells and any(cell.strip() for cell in cells):
                yield before + 1, cells
            before = reader.line_num
    except csv.Error as exc:
        raise InputError(
            f"{path}:{before + 1}: it is not a row of a table: {exc}",
            hint='a `"` inside of a quoted value is written twice; or set quoted: false',
        ) from None


def _named(path: Path, found: Iterator[tuple[int, list[str]]], header: bool) -> Iterator[Record]:
    names: list[str] = []
    first = 0
    for line, cells in found:
        if not names:
            first = line
            names = [name.strip() for name in cells] if header else [*map(str, range(len(cells)))]
            _require_names(path, line, names)
            if header:
                continue
        if len(cells) != len(names):
            raise InputError(
                f"{path}:{line}: it has {_columns(len(cells))}, line {first} has {len(names)}",
                hint="a value that holds the separator needs quotes around it",
            )
        yield Record(f"{path}:{line}", line, dict(zip(names, cells, strict=True)))


def _require_names(path: Path, line: int, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            what = f"two columns are called `{name}`" if name else "two columns have no name"
            raise InputError(f"{path}:{line}: {what}")


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _filled(path: Path, records: Iterable[Record]) -> list[Record]:
    found = list(records)
    if not found:
        raise InputError(f"{path} holds no rows")
    return found
