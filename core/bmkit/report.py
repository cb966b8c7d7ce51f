"""How the library speaks while it works: a Reporter gets messages and progress, and shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


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
