"""How the library speaks while it works: a Reporter gets messages and progress, and shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Task(Protocol):
    """One piece of long work under way."""

    def advance(self, amount: float = 1, **shown: float) -> None:
        """Note that `amount` more units are done; `shown` are figures to show beside the bar."""


class Reporter(Protocol):
    """Whoever wants to know what a stage is doing."""

    def info(self, message: str) -> None:
        """Say something that a user may want to know."""

    def warn(self, message: str) -> None:
        """Say something that a user should know."""

    def begin(self, title: str, total: float, unit: str) -> Task:
        """Start a piece of work of `total` units."""

    def end(self, task: Task) -> None:
        """Note that a piece of work is over, finished or not."""


@contextmanager
def task(reporter: Reporter, title: str, total: float, unit: str = "steps") -> Iterator[Task]:
    """Report a piece of work of `total` units: `advance` the task as they get done."""
    started = reporter.begin(title, total, unit)
    try:
        yield started
    finally:
        reporter.end(started)


class Silent:
    """A Reporter that shows nothing: `-q`, and library use."""

    def info(self, message: str) -> None:
        """Drop `message`."""

    def warn(self, message: str) -> None:
        """Drop `message`."""

    def begin(self, title: str, total: float, unit: str) -> Task:
        """Return a task that shows nothing."""
        return _SilentTask()

    def end(self, task: Task) -> None:
        """Do nothing."""


class _SilentTask:
    def advance(self, amount: float = 1, **shown: float) -> None:
        """Drop the progress."""


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a `--report` file, in one rename. Raises OSError if it can't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
