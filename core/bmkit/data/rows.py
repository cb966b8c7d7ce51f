"""JSON lines from a file or stdin: each row, or what is wrong with it and on which line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit.errors import InputError, did_you_mean

ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Row:
    """One row that could be read."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """One row that could not be read, or says nothing usable."""

    line: int
    problem: str


def read(lines: Iterable[bytes]) -> Iterator[Row | BadRow]:
    """Read JSON lines; empty lines are passed over. Lines count from 1."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield BadRow(number, "it is not UTF-8 text")
        except ValueError as exc:
            yield BadRow(number, f"it is not JSON: {exc}")
        except RecursionError:
            yield BadRow(number, "it is nested too deeply")
        else:
            if isinstance(values, dict):
                yield Row(number, values)
            else:
                yield BadRow(number, "it is not a JSON object")


def read_all(path: Path) -> list[Row]:
    """Read a whole file for training. Raises InputError naming the first bad line, or if empty."""
    rows = []
    with path.open("rb") as stream:
        for row in read(stream):
            if isinstance(row, BadRow):
                raise InputError(f"{path}:{row.line}: {row.problem}")
            rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no rows", hint="it takes one JSON object a line")
    return rows


def text_of(line: bytes) -> str:
    """Return all text of a row, if it can be read, else the line itself."""
    found: list[str] = []

    def gather(value: object) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                gather(part)

    with suppress(ValueError, RecursionError):
        gather(json.loads(line))
    return "\n".join(found) or line.decode(errors="replace")


def require_text(text: str) -> str:
    """Return `text` if it can be encoded. Raises ValueError for halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8 text") from None
    return text


def messages_problem(messages: object) -> str | None:
    """Say what keeps `messages` from being a chat, or None."""
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list of messages"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return "a message needs `role` and `content`, both text"
        if message.get("role") not in ROLES:
            role = str(message.get("role"))
            return (
                f"`{role}` is not a role; {did_you_mean(role, ROLES, otherwise=', '.join(ROLES))}"
            )
    return None


def unknown_shape(values: dict[str, Any], wanted: str) -> str:
    """Say what a row lacks, naming the nearest key."""
    for key in ("prompt", "completion", "text"):
        if key in values and not isinstance(values[key], str):
            return f"`{key}` is not text"
    known = [word.strip("` ") for word in wanted.replace(" or ", ",").replace("/", ",").split(",")]
    for key in values.keys() - set(known):
        if close := did_you_mean(key, known):
            return f"it has no {wanted}; `{key}`: {close}"
    return f"it has no {wanted}"
