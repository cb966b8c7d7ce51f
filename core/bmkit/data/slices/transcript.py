"""A timed transcript: who said what and when, one JSON object a line, times in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmkit.data import rows
from bmkit.errors import InputError, did_you_mean

VERSION = 1
TYPES = ("session", "user", "agent", "label")
MOST_MS = 7 * 24 * 3600 * 1000
"""Of a session; a time of the day in milliseconds since 1970 is far beyond."""


@dataclass(frozen=True)
class Said:
    """Words of the user. With `rev` above 0 they take the place of what began at the same time."""

    t: int
    t_end: int
    text: str
    final: bool = True
    rev: int = 0


@dataclass(frozen=True)
class Label:
    """What happens at a time: `interrupt_start`, `turn_end`, …"""

    t: int
    kind: str


@dataclass(frozen=True)
class Transcript:
    """A session as it was timed. What an agent said in it is kept, and not replayed."""

    id: str
    scheme: str | None
    slice_ms: int | None
    said: tuple[Said, ...]
    labels: tuple[Label, ...] = ()
    agent: tuple[Mapping[str, Any], ...] = ()
    lang: str = "en"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the transcript as lines of JSON, in the order of time."""
        head = {"v": VERSION, "type": "session", "id": self.id, "scheme": self.scheme}
        head |= {"slice_ms": self.slice_ms, "lang": self.lang, "meta": dict(self.meta)}
        events: list[tuple[int, dict[str, Any]]] = []
        for said in self.said:
            row = {"type": "user", "t": said.t, "t_end": said.t_end, "text": said.text}
            events.append((said.t, {**row, "final": said.final, "rev": said.rev}))
        events += [(e.t, {"type": "label", "t": e.t, "kind": e.kind}) for e in self.labels]
        events += [(int(e["t"]), dict(e)) for e in self.agent]
        events.sort(key=lambda pair: pair[0])
        return [json.dumps(row, ensure_ascii=False) for row in (head, *(e for _, e in events))]


def read(path: Path) -> Transcript:
    """Read one. Raises InputError naming the line that is wrong, unsorted times included."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    with path.open("rb") as stream:
        return of_lines(stream, str(path), path.stem)


def of_lines(lines: Iterable[bytes], where: str, name: str) -> Transcript:
    """Read one. `where` is what errors call it, `name` its id if it says none.

    Raises InputError, as `read` does.
    """
    head: dict[str, Any] | None = None
    said: list[Said] = []
    labels: list[Label] = []
    agent: list[dict[str, Any]] = []
    last = 0
    for row in rows.read(lines):
        if isinstance(row, rows.BadRow):
            raise InputError(f"{where}:{row.line}: {row.problem}")
        try:
            kind = _kind(row.values, first=head is None)
            if kind == "session":
                head = _head(row.values)
                continue
            time = _time(row.values, "t")
            if time < last:
                raise ValueError(f"`t` is {time}, before {last} on a line above: sort by time")
            last = time
            if kind == "user":
                said.append(_said(row.values))
            elif kind == "label":
                labels.append(Label(time, str(row.values.get("kind", ""))))
            else:
                agent.append(row.values)
        except ValueError as exc:
            raise InputError(f"{where}:{row.line}: {exc}") from None
    if head is None:
        raise InputError(f"{where} holds no rows", hint="its first line is of the type session")
    return Transcript(
        str(head.get("id", name)),
        head.get("scheme"),
        head.get("slice_ms"),
        tuple(said),
        tuple(labels),
        tuple(agent),
        str(head.get("lang", "en")),
        head.get("meta") or {},
    )


def _kind(values: Mapping[str, Any], *, first: bool) -> str:
    kind = values.get("type")
    if kind not in TYPES:
        near = did_you_mean(str(kind), TYPES, otherwise=", ".join(TYPES))
        raise ValueError(f"`{kind}` is not a type of line; {near}")
    if first != (kind == "session"):
        raise ValueError("the first line, and no other, is of the type session")
    return str(kind)


def _head(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("v", VERSION) != VERSION:
        raise ValueError(f"`v` is {values['v']}: this bmkit reads version {VERSION}")
    slice_ms = values.get("slice_ms")
    if slice_ms is not None and (type(slice_ms) is not int or slice_ms < 1):
        raise ValueError("`slice_ms` is not a number of milliseconds")
    if not isinstance(values.get("scheme"), str | None):
        raise ValueError("`scheme` is not a name")
    if not isinstance(values.get("meta"), dict | None):
        raise ValueError("`meta` is not an object")
    return values


def _time(values: Mapping[str, Any], name: str) -> int:
    time = values.get(name)
    if type(time) is not int or time < 0:
        raise ValueError(f"`{name}` is not a whole number of milliseconds")
    if time > MOST_MS:
        raise ValueError(f"`{name}` is {time}, over a week: count from the session's beginning")
    return time


def _said(values: Mapping[str, Any]) -> Said:
    start = _time(values, "t")
    end = _time(values, "t_end") if "t_end" in values else start
    if end < start:
        raise ValueError(f"`t_end` is {end}, before `t`, {start}")
    text = values.get("text")
    if not isinstance(text, str):
        raise ValueError("`text` is not text")
    final, rev = values.get("final", True), values.get("rev", 0)
    if not isinstance(final, bool):
        raise ValueError("`final` is neither true nor false")
    if type(rev) is not int or rev < 0:
        raise ValueError("`rev` is not a number")
    return Said(start, end, rows.require_text(text), final, rev)
