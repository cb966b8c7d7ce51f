"""A template and a row -> the parts of a prompt, each with what may be done to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from bmkit.data.rows import require_text
from bmkit.errors import InputError, did_you_mean
from bmkit.prompting import filters
from bmkit.prompting.pieces import (
    Again,
    Mask,
    Meta,
    Placeholder,
    Scaffold,
    Soft,
    Special,
    Text,
)
from bmkit.prompting.template import Span, Template

Role = Literal["text", "placeholder", "meta", "mask", "soft", "special", "added"]


@dataclass(frozen=True)
class Part:
    """A part of one row's prompt.

    `space`: a blank is before it. `piece` is the number of the template's piece, `mask` that of
    the mask, else -1. `soft` are the spans of trainable rows that stand here.
    """

    role: Role
    text: str = ""
    space: bool = False
    shortenable: bool = False
    piece: int = -1
    mask: int = -1
    soft: tuple[Span, ...] = ()


class Wraps(Protocol):
    """A template of another kind, that wraps rows by itself."""

    def wrap(self, row: Mapping[str, Any], number: int) -> list[Part]:
        """Return the parts of a row's prompt."""
        ...


def wrap(template: Template | Wraps, row: Mapping[str, Any], number: int) -> list[Part]:
    """Fill a template with a row. `number` names the row in errors.

    A placeholder is looked up among the row's keys, a meta in its `meta` first, if it has one.
    Numbers, true and false become text as JSON writes them. Raises InputError that names the row
    and the key if it is missing, or is no text.
    """
    if not isinstance(template, Template):
        return template.wrap(row, number)
    parts: list[Part] = []
    masks = 0
    for place, piece in enumerate(template.pieces):
        match piece:
            case Text() | Scaffold():
                role: Role = "text" if isinstance(piece, Text) else "added"
                shortenable = isinstance(piece, Text) and piece.shortenable
                parts.append(Part(role, piece.text, piece.space, shortenable, place))
            case Placeholder() | Meta():
                role = "placeholder" if isinstance(piece, Placeholder) else "meta"
                holder = row
                if isinstance(piece, Meta) and isinstance(row.get("meta"), Mapping):
                    holder = row["meta"] if piece.name in row["meta"] else row
                text = filters.apply(piece.post_processing, _text(holder, piece.name, number))
                parts.append(Part(role, text, piece.space, piece.shortenable, place))
            case Mask():
                parts.append(Part("mask", space=piece.space, piece=place, mask=masks))
                masks += 1
            case Soft() | Again():
                spans = template.spans(place)
                parts.append(Part("soft", space=piece.space, piece=place, soft=spans))
            case Special():
                parts.append(Part("special", piece.token, piece.space, piece=place))
    return parts


def as_text(value: Any) -> str:
    """Return text as it is, and a number, true or false as JSON. Raises ValueError for others."""
    if isinstance(value, str):
        return require_text(value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    kind = {type(None): "null", list: "a list", dict: "an object"}.get(type(value), "no text")
    raise ValueError(f"it is {kind}, where text is needed")


def keys_of(row: Mapping[str, Any]) -> str:
    """Name the keys of a row, for an error."""
    return ", ".join(f"`{key}`" for key in row) or "nothing"


def show(parts: Sequence[Part]) -> str:
    """Return a prompt for people to read, with `<mask>`, `<soft>` and `<eos>` where they stand."""
    shown = []
    for part in parts:
        words = [f"<soft:{span.word}>" if span.word else "<soft>" for span in part.soft]
        text = {"mask": "<mask>", "soft": "".join(words)}.get(part.role, part.text)
        shown.append(" " * (part.space and bool(text)) + text)
    return "".join(shown)


def _text(holder: Mapping[str, Any], key: str, number: int) -> str:
    if key not in holder:
        close = did_you_mean(key, holder)
        raise InputError(f"row {number} has no `{key}`; it has {keys_of(holder)}", hint=close)
    try:
        return as_text(holder[key])
    except ValueError as exc:
        raise InputError(f"row {number}: `{key}`: {exc}") from None
