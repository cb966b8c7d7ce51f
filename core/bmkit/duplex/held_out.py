"""Which dialogues a model is measured on: bmkit's own, a file, or a data artifact. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bmkit import artifact, builtin
from bmkit.data.slices import dialogue
from bmkit.data.slices.dialogue import Dialogue
from bmkit.errors import InputError, an_artifact

OWN = "data/duplex-eval.jsonl"
"""Dialogues written by hand, in the folder of built-in recipes."""


def find(given: Path) -> Path:
    """Return the file of dialogues that `given` is or has: of a folder, its `test.jsonl`.

    Raises InputError if there is none, or for an artifact of another kind.
    """
    if given.is_dir():
        if (given / artifact.MANIFEST).is_file():
            found = artifact.open_artifact(given)
            if found.kind != "data":
                raise InputError(
                    f"--data {given} is {an_artifact(found.kind)}, not data",
                    hint="`bmkit duplex build` makes data",
                )
        file = given / "test.jsonl"
        if not file.is_file():
            raise InputError(f"--data {given} has no test.jsonl", hint="name a file of dialogues")
        return file
    if not given.is_file():
        raise InputError(f"--data {given}: no such file or directory")
    return given


def file_of(files: Mapping[str, Path]) -> Path:
    """Return the file that a job's dialogues are in."""
    return files.get("eval.data") or builtin.directory() / OWN


def read(file: Path, limit: int | None) -> list[Dialogue]:
    """Return the dialogues of a file, the first `limit` of them.

    Raises InputError naming the first bad line, or if there is none.
    """
    found = list(dialogue.read(file))
    return found[:limit]
