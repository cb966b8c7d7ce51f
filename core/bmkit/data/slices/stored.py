"""What makes a model a duplex one: `duplex.json` beside its weights. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit.data.slices.layout import STATES, Layout
from bmkit.errors import InputError

FILE = "duplex.json"
VERSION = 1


@dataclass(frozen=True)
class Stored:
    """A model's scheme and how it was trained to be run."""

    scheme: str
    layout: Layout
    slice_ms: int = 1000
    agent_tokens: int = 10
    collapse_idle: bool = True
    threshold: float | None = None
    """The agent speaks if silence is less likely than this; None: if it isn't the likeliest."""


def write(folder: Path, stored: Stored) -> None:
    """Write `duplex.json` into a folder."""
    layout = stored.layout
    marks = {
        "user": list(layout.user),
        "agent": list(layout.agent),
        "idle": layout.idle,
        "end": layout.end,
        "states": dict(layout.states),
        "opening": list(layout.opening),
    }
    values = {
        "version": VERSION,
        "scheme": stored.scheme,
        "tokens": marks,
        "slice_ms": stored.slice_ms,
        "agent_tokens": stored.agent_tokens,
        "collapse_idle": stored.collapse_idle,
        "threshold": stored.threshold,
    }
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def read(folder: Path) -> Stored | None:
    """Read a folder's `duplex.json`; None if it has none. Raises InputError for a damaged one."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        if values["version"] != VERSION:
            raise InputError(f"{file} is of version {values['version']}", hint="update bmkit")
        return _stored(values)
    except KeyError as exc:
        raise InputError(f"{file} is damaged: it has no `{exc.args[0]}`") from None
    except (ValueError, TypeError, AttributeError) as exc:
        raise InputError(f"{file} is damaged: {exc}") from None


def _stored(values: dict[str, Any]) -> Stored:
    marks, threshold = values["tokens"], values["threshold"]
    states = {str(name): int(token) for name, token in marks["states"].items()}
    if states and set(states) != set(STATES):
        raise ValueError(f"`states` are not {', '.join(STATES)}")
    if threshold is not None and not 0 <= float(threshold) <= 1:
        raise ValueError(f"`threshold` is {threshold}, and no probability")
    layout = Layout(
        tuple(int(token) for token in marks["user"]),
        tuple(int(token) for token in marks["agent"]),
        int(marks["idle"]),
        int(marks["end"]),
        tuple((name, states[name]) for name in STATES if name in states),
        tuple(int(token) for token in marks["opening"]),
    )
    return Stored(
        str(values["scheme"]),
        layout,
        int(values["slice_ms"]),
        int(values["agent_tokens"]),
        bool(values["collapse_idle"]),
        None if threshold is None else float(threshold),
    )
