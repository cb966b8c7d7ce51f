"""What a job's model says of how it was trained to listen. No torch."""

from __future__ import annotations

from pathlib import Path

from bmkit.data.slices import stored
from bmkit.data.slices.stored import Stored
from bmkit.errors import InputError
from bmkit.plan import Job


def known_of(job: Job) -> tuple[Stored, Path]:
    """Return what `duplex.json` says, and the folder it is in: a delta's, else the model's.

    Raises InputError saying how to train a model that has none.
    """
    for folder in (*(delta.path for delta in job.deltas), *job.adapter_paths, job.checkpoint):
        if (found := stored.read(folder)) is not None:
            return found, folder
    raise InputError(
        f"{job.model.path} hasn't learned to listen while it speaks: it has no {stored.FILE}",
        hint=f"train it: bmkit tune duplex -m {job.model.path} --data DATA -o duplex-model",
    )


def require_scheme(known: Stored, scheme: str | None, where: str) -> None:
    """Raise InputError if a transcript is of another scheme than the model."""
    if scheme is not None and scheme != known.scheme:
        raise InputError(
            f"{where} is of the scheme `{scheme}`, the model was trained with `{known.scheme}`",
            hint="take a model of that scheme",
        )
