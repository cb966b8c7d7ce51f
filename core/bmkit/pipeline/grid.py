"""A sweep: one stage run with each combination of some keys' values."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmkit import env
from bmkit.errors import BmkitError, DivergedError, UsageError
from bmkit.pipeline import stage as stages
from bmkit.pipeline.stage import Request, Result
from bmkit.report import Reporter, Silent

LONGEST = 120
"""Signs of a result's folder."""
MOST = 64
"""Runs of a sweep; more are more likely a typo."""


def combinations(asked: Sequence[str]) -> list[tuple[str, ...]]:
    """Return for words like `a.b=1,2` every choice of one value each, as words for `--set`.

    Commas inside of brackets and quotes don't part values. Raises UsageError for a word that isn't
    of that form, for a key that is there twice, and for too many choices.
    """
    keys: list[str] = []
    choices: list[list[str]] = []
    for word in asked:
        key, found, values = word.partition("=")
        parts = _parts(values)
        if not found or not key.strip() or any(not part for part in parts):
            raise UsageError(f"--grid {word}: it takes KEY=VALUE,VALUE,…")
        if key in keys:
            raise UsageError(f"--grid {word}: `{key}` is there twice")
        keys.append(key)
        choices.append([f"{key}={part}" for part in parts])
    whole = list(itertools.product(*choices))
    if len(whole) > MOST:
        raise UsageError(f"--grid asks for {len(whole)} runs, {MOST} are the most")
    return whole


def _parts(text: str) -> list[str]:
    found, depth, quote = [""], 0, ""
    for sign in text:
        quote = "" if sign == quote else quote or (sign if sign in "\"'" else "")
        depth += not quote and (sign in "[{") - (sign in "]}")
        if sign == "," and not quote and not depth:
            found.append("")
        else:
            found[-1] += sign
    return [part.strip() for part in found]


def requests(request: Request, asked: Sequence[str]) -> list[tuple[str, Request]]:
    """Return a request for each combination, by a name that says it. All recipes are validated.

    With an `out`, each result goes into a folder of that name in it. Raises what `stage.check`
    does.
    """
    found = []
    for words in combinations(asked):
        name = _name(words)
        out = None if request.out is None else request.out / name
        one = replace(request, assign=(*request.assign, *words), out=out)
        stages.load_recipe(one)
        found.append((name, one))
    names = [name for name, _ in found]
    if request.out is not None and len(set(names)) < len(names):
        raise UsageError("--grid: two combinations would have the same name; leave --out away")
    return found


def _name(words: Sequence[str]) -> str:
    short = (f"{w.partition('=')[0].rpartition('.')[2]}={w.partition('=')[2]}" for w in words)
    name = re.sub(r"[^A-Za-z0-9=,._+-]+", "_", ",".join(short))
    if len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def check(asked: Sequence[tuple[str, Request]]) -> None:
    """Plan all runs. Raises what `--plan` does of the first that can't be, with its name."""
    for name, request in asked:
        try:
            prepared = stages.prepare(request, Silent())
            if prepared.done is None:
                stages.check_fits(prepared, Silent())
        except BmkitError as exc:
            raise type(exc)(f"{name}: {exc}; nothing was trained", hint=exc.hint) from None


def run(
    asked: Sequence[tuple[str, Request]], reporter: Reporter
) -> Iterator[tuple[str, Request, Result]]:
    """Run one request after the other; what is there already is used again."""
    if env.process()[1] > 1:
        raise UsageError("--grid runs in one process: launch its runs one by one")
    for number, (name, request) in enumerate(asked, 1):
        reporter.info(f"run {number} of {len(asked)}: {name}")
        try:
            yield name, request, stages.run_stage(request, reporter)
        except DivergedError as exc:
            reporter.warn(f"{name}: {exc}")


def best(rows: Sequence[dict[str, Any]], metric: str | None) -> tuple[int, str]:
    """Return which of some runs' metrics is best, and by which figure.

    Without a name it is the accuracy on held-out rows, else their loss, else the training loss.
    Accuracies are the better the greater they are, losses the smaller.
    """
    names = [metric] if metric else ["dev_accuracy", "dev_loss", "train_loss"]
    for name in names:
        values = [row.get(name) for row in rows]
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        if len(numbers) == len(values):
            sign = 1 if "loss" in name or "perplexity" in name else -1
            return min(range(len(numbers)), key=lambda i: sign * numbers[i]), name
    raise UsageError(f"--grid: not every run has measured {' or '.join(names)}")


def table(rows: Sequence[tuple[str, dict[str, Any]]], chosen: int) -> list[str]:
    """Return a head and a line for each run, with the best one marked."""
    wanted = ("train_loss", "dev_loss", "dev_accuracy", "dev_f1", "steps", "trainable_parameters")
    columns = [c for c in wanted if any(c in metrics for _, metrics in rows)]
    cells = [["", *columns]]
    for number, (name, metrics) in enumerate(rows):
        mark = "* " if number == chosen else "  "
        cells.append([mark + name, *(f"{metrics.get(c, '-')}" for c in columns)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def out_is_free(out: Path | None) -> None:
    """Raise UsageError if a sweep's folder is a single artifact, or a file."""
    if out is not None and ((out / "bmkit.json").exists() or out.is_file()):
        raise UsageError(f"--out {out}: a sweep wants a folder, for a result in it each run")
