"""Deltas of a job by the names that rows call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bmkit.artifact import deltas
from bmkit.plan import Job


@dataclass(frozen=True)
class Adapters:
    """A job's deltas, in the order in which they go on the model."""

    folders: Mapping[str, Path]
    """Each by its name: the last part of its path, or all of it where that is not one's alone."""
    wholes: Mapping[str, tuple[str, ...]]
    """Artifacts of several deltas by such names, with their deltas'."""

    @property
    def names(self) -> list[str]:
        """Return what rows may name."""
        return [*self.folders, *self.wholes]


def adapters_of(job: Job) -> Adapters:
    """Return the deltas of a job. Raises InputError for an artifact that is damaged."""
    artifacts = [delta.path for delta in job.deltas]
    parts = [deltas(path) for path in artifacts]
    folders = [folder for part in parts for folder in part]
    called = _names(folders)
    left = iter(called)
    wholes = {
        str(path) if name in called else name: tuple(next(left) for _ in part)
        for name, path, part in zip(_names(artifacts), artifacts, parts, strict=True)
    }
    several = {name: own for name, own in wholes.items() if len(own) > 1}
    return Adapters(dict(zip(called, folders, strict=True)), several)


def _names(paths: Sequence[Path]) -> list[str]:
    last = [path.name for path in paths]
    return [str(p) if last.count(p.name) > 1 else p.name for p in paths]
