"""Which rows of its output head a draft uses: a file beside its weights, which others pass over."""

from __future__ import annotations

import json
from pathlib import Path

from bmkit.errors import InputError

FILE = "frequent_tokens.json"


def read(path: Path, vocabulary: int) -> list[int] | None:
    """Return the tokens that the checkpoint at `path` can say; None for all.

    Raises InputError if the file is damaged.
    """
    file = path / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["tokens"]
        tokens = [int(t) for t in found]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{file} is damaged: {exc}") from None
    if not tokens or tokens != sorted(set(tokens)) or tokens[0] < 0 or tokens[-1] >= vocabulary:
        raise InputError(f"{file} is damaged: it holds no ascending token numbers")
    return tokens


def write(path: Path, tokens: list[int]) -> None:
    """Write the file for the checkpoint at `path`."""
    text = json.dumps({"tokens": tokens})
    (path / FILE).write_text(text + "\n", encoding="utf-8")
