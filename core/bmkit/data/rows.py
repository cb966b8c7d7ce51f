"""JSON lines from a file or stdin: each row, or what is wrong with it and on which line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit.errors import InputError, did_you_mean

WANTED = {
    "preference": "`prompt`, `chosen`, `rejected`",
    "seq2seq_lm": "`prompt`, `completion`",
    "masked_lm": "`text`",
}
"""Keys of rows that are trained on, by tasks that have one form of them."""
PLAIN = {".txt", ".md"}
"""Endings of files that are one text; others hold rows."""
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
        raise ValueError("it holds half a character, which UTF-8 text can't have") from None
    return text


def lacking(task: str, values: dict[str, Any]) -> str | None:
    """Say what keeps a row without labels from being trained on for a task, or None."""
    wanted = WANTED.get(task)
    if wanted is not None:
        names = [word.strip("`") for word in wanted.split(", ")]
        told = all(isinstance(values.get(name), str) for name in names)
        return None if told else unknown_shape(values, wanted)
    if "messages" in values:
        if problem := messages_problem(values["messages"]):
            return problem
        answered = any(message["role"] == "assistant" for message in values["messages"])
        return None if answered else "no message has the role assistant: there is nothing to learn"
    if "prompt" in values and "completion" in values:
        both = isinstance(values["prompt"], str) and isinstance(values["completion"], str)
        return None if both else "`prompt` and `completion` must be text"
    if isinstance(values.get("text"), str):
        return None
    return unknown_shape(values, "`messages`, `prompt`/`completion` or `text`")


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
