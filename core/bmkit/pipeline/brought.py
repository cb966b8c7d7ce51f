"""`bmkit import dataset`: a data artifact of what the `datasets` library reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import bmkit
from bmkit import artifact, hashes, place
from bmkit.artifact import Artifact, Step
from bmkit.errors import InputError, did_you_mean
from bmkit.foreign import dataset as foreign
from bmkit.report import Reporter

VERSION = 1


def dataset(
    name: str,
    out: Path,
    reporter: Reporter,
    *,
    subset: str | None = None,
    revision: str | None = None,
    splits: tuple[str, ...] = (),
    limit: int | None = None,
    force: bool = False,
) -> tuple[Artifact, bool]:
    """Write a file of rows for each split, `train.jsonl` and so on, into the artifact at `out`.

    Returns it, and whether it was there already. `splits` names those wanted, as they are called
    here; with `limit`, no more than so many rows of each. What was made of the same files, or of
    the same name on the Hub, is left as it is. Raises InputError for splits that aren't there or
    hold nothing.
    """
    about = {
        "name": name,
        "subset": subset,
        "revision": revision,
        "splits": list(splits),
        "limit": limit,
    }
    key = artifact.stage_key("import", VERSION, about, _digests(Path(name).expanduser()))
    if (done := place.occupied(out, key, force=force)) is not None:
        return done, True
    found = foreign.read(name, subset=subset, revision=revision)
    known = [split.name for split in found]
    for wanted in splits:
        if wanted not in known:
            raise InputError(
                f"{name} has no split `{wanted}`",
                hint=did_you_mean(wanted, known) or f"it has {', '.join(known)}",
            )
    counts: dict[str, int] = {}
    with place.create(out, key=key, force=force) as scratch:
        for split in found:
            if splits and split.name not in splits:
                continue
            if not re.fullmatch(r"[\w.-]+", split.name):
                raise InputError(f"{name} has a split called {split.name!r}")
            counts[f"rows_{split.name}"] = _write(
                split, scratch / f"{split.name}.jsonl", limit, reporter
            )
            for column in sorted(split.left_out):
                reporter.warn(f"{split.name}: column `{column}` holds what JSON can't: left out")
        if not any(counts.values()):
            raise InputError(f"{name} holds no rows")
        step = Step(stage="import", name="dataset", key=key, recipe=about)
        manifest = artifact.write_manifest(
            scratch, version=bmkit.__version__, kind="data", steps=[step], metrics=counts
        )
    artifact.remember(out, manifest)
    return artifact.open_artifact(out), False


def _digests(source: Path) -> dict[str, str]:
    """Return the digests of a folder's files, or of a file; of a name on the Hub, nothing."""
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.is_file())
    with hashes.HashCache() as cache:
        return {str(file.relative_to(source.parent)): cache.sha256(file) for file in files}


def _write(split: foreign.Split, file: Path, limit: int | None, reporter: Reporter) -> int:
    bounds = [count for count in (limit, split.count) if count is not None]
    bar = reporter.begin(split.name, min(bounds), "rows") if bounds else None
    count = 0
    try:
        with file.open("w", encoding="utf-8") as stream:
            for row in split:
                if count == limit:
                    break
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
                if bar is not None:
                    bar.advance(1)
    finally:
        if bar is not None:
            reporter.end(bar)
    return count
