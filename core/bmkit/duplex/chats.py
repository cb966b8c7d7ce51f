"""Chats out of files of JSON lines: their turns, a user's words with what was answered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit.data import rows
from bmkit.data.slices import ultrachat
from bmkit.data.slices.dialogue import Dialogue
from bmkit.errors import InputError

SHAPES = {
    "messages": "messages",
    "conversations": "conversations",
    "duplex_ultrachat": "output",
}
"""The key by which a row shows its format."""
USERS = ("user", "human", "prompter")
AGENTS = ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "agent")
OTHERS = ("system", "tool", "developer", "function", "observation")


@dataclass(frozen=True)
class Turn:
    """What a user says, and what is answered."""

    user: str
    agent: str


@dataclass(frozen=True)
class Chat:
    """Turns of one conversation. `id` is a hash of what is said in it."""

    id: str
    turns: tuple[Turn, ...]


def read(
    path: Path, format: str, limit: int | None = None, *, kind: str = "imported"
) -> Iterator[Chat | Dialogue | None]:
    """Yield a file's chats, dialogues that are in slices already, and None for a row without turns.

    Dialogues are of `kind`, and called by their line.
    Raises InputError naming the first row that can't be read, or if there is none.
    """
    count = 0
    with path.open("rb") as stream:
        for row in rows.read(stream):
            if limit is not None and count >= limit:
                break
            count += 1
            if isinstance(row, rows.BadRow):
                raise InputError(f"{path}:{row.line}: {row.problem}")
            try:
                found = _read(row.values, format, kind, row.line)
            except ValueError as exc:
                raise InputError(f"{path}:{row.line}: {exc}") from None
            yield found
    if not count:
        raise InputError(f"{path} holds no rows", hint="it takes one chat a line")


def _read(values: Mapping[str, Any], format: str, kind: str, line: int) -> Chat | Dialogue | None:
    shapes = SHAPES if format == "auto" else {format: SHAPES[format]}
    shape = next((name for name, key in shapes.items() if key in values), None)
    if shape is None:
        keys = " or ".join(f"`{key}`" for key in shapes.values())
        raise ValueError(rows.unknown_shape(dict(values), keys))
    if shape == "duplex_ultrachat":
        return ultrachat.of_row(values, id=f"{kind}-{line}", kind=kind)
    said = messages(values) if shape == "messages" else conversations(values)
    turns = paired(said)
    if not turns:
        return None
    whole = "\0".join(text for turn in turns for text in (turn.user, turn.agent))
    return Chat(hashlib.blake2b(whole.encode(), digest_size=8).hexdigest(), turns)


def messages(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sides and texts of a row of `messages`. Raises ValueError for what is no chat."""
    if problem := rows.messages_problem(values["messages"]):
        raise ValueError(problem)
    return [(_side(m["role"]), rows.require_text(m["content"])) for m in values["messages"]]


def conversations(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sides and texts of ShareGPT's `conversations`. Raises ValueError as above."""
    listed = values["conversations"]
    if not isinstance(listed, list) or not listed:
        raise ValueError("`conversations` is not a list of messages")
    found = []
    for one in listed:
        texts = isinstance(one, dict) and isinstance(one.get("value"), str)
        if not texts or not isinstance(one.get("from"), str):
            raise ValueError("a message needs `from` and `value`, both text")
        found.append((_side(one["from"]), rows.require_text(one["value"])))
    return found


def _side(role: str) -> str:
    role = role.lower()
    if role in USERS:
        return "user"
    if role in AGENTS:
        return "agent"
    if role not in OTHERS:
        raise ValueError(f"`{role}` is not a role; there are {', '.join((*USERS, *AGENTS))}")
    return "other"


def paired(said: list[tuple[str, str]]) -> tuple[Turn, ...]:
    """Return the turns of what two sides say: who speaks several times in a row speaks once.

    What an agent says first, what isn't answered, and other sides are left out.
    """
    sides: list[tuple[str, str]] = []
    for side, text in said:
        text = " ".join(text.split()) if side == "user" else text.strip()
        if side == "other" or not text:
            continue
        if sides and sides[-1][0] == side:
            sides[-1] = (side, f"{sides[-1][1]} {text}")
        elif sides or side == "user":
            sides.append((side, text))
    pairs = zip(sides[::2], sides[1::2], strict=False)
    return tuple(Turn(user, agent) for (_, user), (_, agent) in pairs)
