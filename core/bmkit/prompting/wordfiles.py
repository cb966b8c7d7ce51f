"""Files of label words: JSON by label, or text with a line for each label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmkit.errors import InputError, RecipeError
from bmkit.prompting.labelwords import Words, parse

TEXT = (".txt", ".csv")
JSON = (".json", ".jsonl")


def read_words(path: Path, labels: Sequence[str], choice: int = 0) -> Words:
    """Read the label words of a file; `choice` says which set, counted from 0.

    A .json or .jsonl file holds a mapping from labels to words, a list of such mappings, or one in
    each line. A .txt or .csv file has a line for each label in their order, with commas between
    words; an empty line begins another set. Raises InputError naming the file.
    """
    if path.suffix not in TEXT + JSON:
        raise InputError(f"{path}: label words are in {', '.join(TEXT + JSON)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    sets = _lines(text) if path.suffix in TEXT else _mappings(path, text)
    if not 0 <= choice < len(sets):
        raise InputError(
            f"{path} holds {len(sets)} sets of label words: there is no choice {choice}",
            hint="choice counts from 0",
        )
    try:
        return parse(sets[choice], labels)
    except RecipeError as exc:
        raise InputError(f"{path}: {exc}", hint=exc.hint) from None


def _lines(text: str) -> list[list[list[str]]]:
    sets: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.strip():
            words = [word.strip() for word in line.split(",")]
            sets[-1].append([word for word in words if word])
        elif sets[-1]:
            sets.append([])
    return [found for found in sets if found]


def _mappings(path: Path, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as whole:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise InputError(f"{path}: it is not JSON: {whole}") from None
    sets = found if isinstance(found, list) else [found]
    for one in sets:
        if not isinstance(one, dict) or not all(_are_words(own) for own in one.values()):
            raise InputError(f"{path}: it takes mappings from labels to words or lists of words")
    return sets


def _are_words(own: Any) -> bool:
    return isinstance(own, str) or (
        isinstance(own, list) and all(isinstance(word, str) for word in own)
    )
