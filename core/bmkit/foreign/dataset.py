"""Rows of the `datasets` library: of the Hub, of a folder it has saved, of Parquet files."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit.errors import BmkitError, InputError, ResourceError, did_you_mean, first_line
from bmkit.foreign import extra

SPLITS = {
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "validation_matched": "dev",
}
"""What splits are called there, and here."""
READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
}
"""Formats of single files."""
FAMILY = ("datasets.", "pyarrow.", "huggingface_hub.")
"""Libraries whose own errors are about the data."""
NO_LABEL = -1
"""What stands for a label that isn't told, as in the test splits of GLUE."""


@dataclass
class Split:
    """A part of a dataset, whose rows are read once."""

    name: str
    """What it is called here: `train`, `dev`, `test`, or as its makers call it."""
    rows: Any
    features: Mapping[str, Any]
    left_out: set[str]
    """Columns met so far whose values JSON can't hold."""
    count: int | None
    """How many rows there are, where that is known."""
    source: str
    """Where the dataset is."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield rows that JSON can hold; numbers of classes are their names.

        Raises InputError for what can't be read.
        """
        with _refusals(self.source):
            yield from self._each()

    def _each(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            found: dict[str, Any] = {}
            for column, value in row.items():
                try:
                    found[column] = _plain(value, self.features.get(column))
                except TypeError:
                    self.left_out.add(column)
                except _Untold:
                    pass
            yield found


class _Untold(Exception):
    """A label that isn't told."""


def read(name: str, *, subset: str | None = None, revision: str | None = None) -> list[Split]:
    """Return the splits of a dataset: a folder or file, else a name on the Hugging Face Hub.

    Nothing but the first rows is read before a split is iterated. Raises ResourceError if the
    library isn't installed or the Hub can't be reached, InputError if there is no such dataset or
    it can't be read.
    """
    library = extra.load("datasets", "datasets", "reading a dataset")
    library.disable_progress_bars()
    path = Path(name).expanduser()
    with _refusals(name):
        found = _open(library, name, path, subset, revision)
        parts = found if isinstance(found, dict) else {str(found.split or "train"): found}
        return [
            Split(
                SPLITS.get(split, split),
                rows,
                rows.features or {},
                set(),
                _count(rows, split),
                name,
            )
            for split, rows in parts.items()
        ]


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Say of what the library raises that it is about the dataset."""
    try:
        yield
    except BmkitError:
        raise
    except Exception as exc:
        here = Path(name).expanduser().exists()
        if not here and isinstance(exc, ConnectionError | FileNotFoundError):
            raise _missing(name, exc) from None
        if type(exc).__module__.startswith(FAMILY) or isinstance(exc, OSError | ValueError):
            raise InputError(f"{name} can't be read: {first_line(exc)}") from None
        raise


def _count(rows: Any, split: str) -> int | None:
    known: int | None = getattr(rows, "num_rows", None)
    if known is None and (told := (rows.info.splits or {}).get(split)) is not None:
        known = told.num_examples
    return known


def _open(library: Any, name: str, path: Path, subset: str | None, revision: str | None) -> Any:
    if path.is_file():
        if (reader := READERS.get(path.suffix)) is None:
            raise InputError(
                f"{path} is of no format that is known here",
                hint=f"it takes {', '.join(READERS)}, a folder, or a name on the Hub",
            )
        if not path.stat().st_size:
            raise InputError(f"{path} holds no rows")
        how = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        return library.load_dataset(reader, data_files=str(path), streaming=True, **how)
    if path.is_dir() and (
        (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    ):
        return library.load_from_disk(str(path))
    source = str(path) if path.is_dir() else name
    if subset is not None:
        known = library.get_dataset_config_names(source, revision=revision)
        if subset not in known:
            raise InputError(
                f"{name} has no subset `{subset}`",
                hint=did_you_mean(subset, known) or f"it has {', '.join(known)}",
            )
    return library.load_dataset(source, subset, revision=revision, streaming=True)


def _missing(name: str, exc: Exception) -> InputError | ResourceError:
    offline = isinstance(exc, ConnectionError) or "offline" in str(exc).lower()
    if offline:
        return ResourceError(
            f"there is no folder {name}, and the Hub can't be reached: {first_line(exc)}",
            hint="a folder of `save_to_disk`, or of Parquet files, needs no network",
        )
    return InputError(f"there is no dataset {name}: {first_line(exc)}")


def _plain(value: Any, feature: Any) -> Any:
    """Return a value as JSON has it. Raises TypeError for one that it can't hold."""
    names = getattr(feature, "int2str", None)
    if names is not None and isinstance(value, int):
        if value == NO_LABEL:
            raise _Untold
        return names(value)
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_plain(one, inner) for one in value]
    if isinstance(value, dict):
        inside = feature if isinstance(feature, Mapping) else {}
        return {key: _plain(one, inside.get(key)) for key, one in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(type(value).__name__)
