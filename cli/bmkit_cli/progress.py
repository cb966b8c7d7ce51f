"""How a run is shown on stderr: a bar on a terminal, lines elsewhere, JSON events, or nothing."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from bmkit import env
from bmkit.report import Reporter, Silent, Task
from bmkit_cli.options import Progress


def reporter(how: Progress, *, quiet: bool) -> Reporter:
    """Return the reporter for this run; of several processes the first one reports."""
    if quiet or env.process()[0]:
        return Silent()
    if how is Progress.auto:
        how = Progress.bar if sys.stderr.isatty() else Progress.lines
    if how is Progress.none:
        return Messages()
    kinds: dict[Progress, type[Reporter]] = {
        Progress.bar: Bars,
        Progress.lines: Lines,
        Progress.json: Events,
    }
    return kinds[how]()


class Messages(Silent):
    """Messages, and no progress."""

    def info(self, message: str) -> None:
        """Print the message."""
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()

    def warn(self, message: str) -> None:
        """Print the message, marked."""
        self.info(f"warning: {message}")


class Lines(Messages):
    """A line for every tenth of a task."""

    def begin(self, title: str, total: float, unit: str) -> Task:
        """Start a task."""
        return _Lines(self, title, total, unit)


class _Lines:
    def __init__(self, owner: Messages, title: str, total: float, unit: str) -> None:
        self.owner, self.title, self.total, self.unit = owner, title, total, unit
        self.done = 0.0
        self.tenths = 0
        self.skipped = 0.0
        self.start = time.monotonic()

    def advance(self, amount: float = 1, **shown: float) -> None:
        """Note progress; print when another tenth is done."""
        if self.done == 0 and amount > 1:  # what a resumed run had done says nothing of its rate
            self.skipped = amount
        self.done += amount
        tenths = int(10 * self.done / self.total) if self.total else 10
        if tenths > self.tenths:
            self.tenths = tenths
            self.owner.info(self._line(shown))

    def _line(self, shown: dict[str, float]) -> str:
        seconds = time.monotonic() - self.start
        rate = (self.done - self.skipped) / max(seconds, 1e-9)
        figures = "".join(f", {figure}" for figure in _figures(shown))
        if rate:  # else nothing is known of it yet
            left = _span((self.total - self.done) / rate)
            figures = f", {rate:.3g} {self.unit}/s, {left} left{figures}"
        return (
            f"{self.title}: {min(100 * self.done / (self.total or 1), 100):3.0f} % "
            f"({self.done:.0f}/{self.total:.0f} {self.unit}){figures}"
        )


class Bars(Messages):
    """A bar with rate and time left, drawn by rich."""

    def begin(self, title: str, total: float, unit: str) -> Task:
        """Start a task with its bar."""
        return _Bar(title, total, unit)

    def end(self, task: Task) -> None:
        """Leave the bar as it stands."""
        if isinstance(task, _Bar):
            task.progress.stop()


class _Bar:
    def __init__(self, title: str, total: float, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.unit = unit
        self.start = time.monotonic()
        self.done = self.skipped = 0.0
        self.progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.progress.start()
        self.task = self.progress.add_task(title, total=total, shown=unit)

    def advance(self, amount: float = 1, **shown: float) -> None:
        """Move the bar."""
        if self.done == 0 and amount > 1:
            self.skipped = amount
        self.done += amount
        rate = (self.done - self.skipped) / max(time.monotonic() - self.start, 1e-9)
        figures = "".join(f"  {figure}" for figure in _figures(shown))
        self.progress.update(self.task, advance=amount, shown=f"{rate:.3g} {self.unit}/s{figures}")


class Events:
    """One JSON object on stderr for everything that happens."""

    def info(self, message: str) -> None:
        """Write an info event."""
        self._event("info", message=message)

    def warn(self, message: str) -> None:
        """Write a warning event."""
        self._event("warning", message=message)

    def begin(self, title: str, total: float, unit: str) -> Task:
        """Write a begin event."""
        self._event("begin", task=title, total=total, unit=unit)
        return _EventTask(self, title, total)

    def end(self, task: Task) -> None:
        """Write an end event."""
        if isinstance(task, _EventTask):
            self._event("end", task=task.title, done=task.done, total=task.total)

    def _event(self, event: str, **values: Any) -> None:
        sys.stderr.write(json.dumps({"event": event, **values}) + "\n")
        sys.stderr.flush()


class _EventTask:
    def __init__(self, owner: Events, title: str, total: float) -> None:
        self.owner, self.title, self.total, self.done = owner, title, total, 0.0

    def advance(self, amount: float = 1, **shown: float) -> None:
        """Write a progress event."""
        self.done += amount
        figures = {name: value for name, value in shown.items() if value == value}
        self.owner._event("progress", task=self.title, done=self.done, total=self.total, **figures)


def _figures(shown: dict[str, float]) -> list[str]:
    """Return figures in words: `loss 1.23`, `840 tokens/s`."""
    rates = "_per_second"
    return [
        f"{value:{'.0f' if value > 100 else '.3g'}} {name.removesuffix(rates)}/s"
        if name.endswith(rates)
        else f"{name} {value:.4g}"
        for name, value in shown.items()
    ]


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
