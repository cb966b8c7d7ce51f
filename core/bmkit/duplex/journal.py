"""A session on disk: its log grows line by line, and is whole whenever its writer was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bmkit.duplex import units
from bmkit.duplex.agent import AgentSlice
from bmkit.duplex.session import DuplexSession
from bmkit.errors import InputError, OutputTaken, ResourceError

HEAD, LOG, EVENTS = "session.json", "tokens.jsonl", "events.jsonl"
VERSION = 1


class Journal:
    """Follows a session: `note` after each operation.

    `session.json` says which model and layout. A line of `tokens.jsonl` says how the token log has
    changed: which slices of the line before stay, which come behind them, and the counters.
    `events.jsonl` is what was heard and said, for people; nothing is read from it.
    """

    def __init__(self, folder: Path, session: DuplexSession, written: list[units.Unit]) -> None:
        self.folder, self.session, self._written = folder, session, written
        self._log = (folder / LOG).open("a", encoding="utf-8")
        self._events = (folder / EVENTS).open("a", encoding="utf-8")

    @classmethod
    def begin(cls, folder: Path, session: DuplexSession, head: Mapping[str, Any]) -> Journal:
        """Begin one in an empty or new folder; `head` is what resuming compares.

        Raises OutputTaken if a session is there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / HEAD).exists():
            raise OutputTaken(f"{folder} holds a session", hint="resume it, or name another folder")
        whole = {"version": VERSION, "layout": asdict(session.layout), **head}
        partial = folder / f".{HEAD}.partial"
        partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder / HEAD)
        found = cls(folder, session, [])
        found.note()
        return found

    @classmethod
    def resume(cls, folder: Path, session: DuplexSession, head: Mapping[str, Any]) -> Journal:
        """Let a new session go on where the folder's was. Raises InputError if it is another's."""
        said = read_head(folder)
        wanted = json.loads(json.dumps({"layout": asdict(session.layout), **head}))
        for name, value in wanted.items():
            if said.get(name) != value:
                raise InputError(
                    f"{folder} was recorded with another `{name}`",
                    hint="resume it with the model that it was begun with",
                )
        found, counters = _read(folder / LOG)
        if counters:
            session.restore(found, counters)
        return cls(folder, session, found)

    def note(self, agent: AgentSlice | None = None) -> None:
        """Write down what has changed, and what the agent did."""
        now, before = self.session.units, self._written
        keep: list[int] = []
        for unit in now:
            low = keep[-1] + 1 if keep else 0
            place = next((i for i in range(low, len(before)) if before[i] is unit), None)
            if place is None:
                break
            keep.append(place)
        new = [unit.values() for unit in now[len(keep) :]]
        self._write(self._log, {"keep": _spans(keep), "units": new, **self.session.counters()})
        self._written = list(now)
        if agent is not None:
            self._write(self._events, {"heard": agent.heard, **agent.values()})

    def _write(self, stream: Any, row: Mapping[str, Any]) -> None:
        try:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
        except OSError as exc:
            raise ResourceError(
                f"{self.folder}: the session can't be kept: {exc.strerror}"
            ) from None

    def close(self) -> None:
        """Close the files."""
        for stream in (self._log, self._events):
            with suppress(OSError):  # what couldn't be written was told of when it failed
                stream.close()


def _spans(places: list[int]) -> list[list[int]]:
    """Return runs of ascending places as pairs of a first one and one behind the last."""
    found: list[list[int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1][1] += 1
        else:
            found.append([place, place + 1])
    return found


def read_head(folder: Path) -> dict[str, Any]:
    """Read `session.json`. Raises InputError if it isn't there, or damaged."""
    file = folder / HEAD
    if not file.is_file():
        raise InputError(f"{folder} holds no session")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise InputError(f"{file} is of version {found['version']}", hint="update bmkit")
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{file} is damaged: {exc}") from None
    return dict(found)


def _read(file: Path) -> tuple[list[units.Unit], dict[str, Any]]:
    """Return the units and counters of the last whole line; what was half written is taken off."""
    if not file.is_file():
        return [], {}
    raw = file.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(file, len(whole))
    found: list[units.Unit] = []
    counters: dict[str, Any] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            kept = [unit for low, high in row["keep"] for unit in found[low:high]]
            found = kept + [units.of_values(values) for values in row["units"]]
            counters = {k: v for k, v in row.items() if k not in {"keep", "units"}}
        except (ValueError, KeyError, TypeError) as exc:
            raise InputError(f"{file}:{number}: it is damaged: {exc}") from None
    return found, counters
