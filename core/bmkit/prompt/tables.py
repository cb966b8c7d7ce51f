"""Tables of rows to answer, read as those were that a prompt was made on. No torch here."""

from __future__ import annotations

from pathlib import Path

from bmkit.data.rows import Row
from bmkit.data.tabular import Table, read_table
from bmkit.prompt import kept
from bmkit.prompt.rows import ANSWERS


def rows(prompt: Path, path: Path) -> list[Row]:
    """Return the rows of a CSV or TSV, or of a compressed file, for an artifact's prompt.

    Its columns are by number where the prompt's were, unless the first line has the prompt's own
    names. Raises InputError for a file that can't be read.
    """
    found = kept.read(prompt).first
    named = found.header
    if named is None:
        named = not found.columns or any(isinstance(c, str) for c in found.columns.values())
    table = read_table(path, header=named, quoted=found.quoted)
    wanted = {name for name in found.columns if name not in ANSWERS}
    if found.header is None and not table.named and wanted:
        first = {str(value).strip() for value in table.records[0].values.values()}
        if wanted <= first:
            table = read_table(path, header=True, quoted=found.quoted)
    return _numbered(table)


def _numbered(table: Table) -> list[Row]:
    """Return the rows, in which each column is known by its number as well."""
    found = []
    for one in table.records:
        numbers = {str(at): value for at, value in enumerate(one.values.values())}
        found.append(Row(one.line, {**numbers, **one.values}))
    return found
