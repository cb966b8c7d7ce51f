"""The generation verbalizer: labels as texts to say, made from each row by rules.

A rule is text with pieces in braces: `{"meta": "choice1"}`, `{"placeholder": "text_a"}` and
`{"text": "…"}`. A label has one rule for each mask.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bmkit.errors import InputError, RecipeError, did_you_mean

KINDS = ("meta", "placeholder", "text")


@dataclass(frozen=True)
class Piece:
    """A part of a rule: text as it is, or the name of what a row holds."""

    kind: Literal["meta", "placeholder", "text"]
    said: str


Rule = tuple[Piece, ...]


def parse_rule(text: str) -> Rule:
    """Return the pieces of a rule. Raises RecipeError naming the position of what is wrong."""
    pieces: list[Piece] = []
    at = 0
    while at < len(text):
        start = text.find("{", at)
        plain = text[at:] if start < 0 else text[at:start]
        if "}" in plain:
            raise RecipeError(f"`{text}`: `}}` at {at + plain.index('}')} closes nothing")
        if plain:
            pieces.append(Piece("text", plain))
        if start < 0:
            break
        end = _closing(text, start)
        pieces.append(_piece(text, start, end))
        at = end + 1
    return tuple(pieces)


def parse_rules(
    spec: Mapping[str, str | Sequence[str]], labels: Sequence[str], masks: int = 1
) -> tuple[tuple[Rule, ...], ...]:
    """Return the rules of each label, one for each mask, in the order of `labels`.

    Raises RecipeError for a label without rules, and for more or fewer than masks.
    """
    rules = []
    for label in labels:
        if label not in spec:
            close = did_you_mean(label, spec, otherwise="each label takes one for each mask")
            raise RecipeError(f"label words: `{label}` has none", hint=close)
        own = spec[label]
        texts = [own] if isinstance(own, str) else list(own)
        if len(texts) != masks:
            raise RecipeError(
                f"label words: `{label}` has {len(texts)} texts for {masks} masks",
                hint="it takes a list with one for each mask of the template",
            )
        rules.append(tuple(parse_rule(text) for text in texts))
    return tuple(rules)


def targets(rules: Sequence[Rule], values: Mapping[str, Any], where: str) -> list[str]:
    """Return what is to be said at each mask for one label and one row.

    `values` are the row's, by column; `meta` is a mapping, and names that it lacks are looked for
    among the columns. Raises InputError naming the row and the column.
    """
    return ["".join(_said(piece, values, where) for piece in rule).strip() for rule in rules]


def choices(
    rules: Sequence[Sequence[Rule]], values: Mapping[str, Any], where: str
) -> list[list[str]]:
    """Return what would be said at each mask for each label, for scoring one row."""
    return [targets(own, values, where) for own in rules]


def _closing(text: str, start: int) -> int:
    """Return where the brace at `start` is closed, braces within quotes apart."""
    depth, quote, at = 0, "", start
    while at < len(text):
        letter = text[at]
        if quote:
            if letter == "\\":
                at += 1
            elif letter == quote:
                quote = ""
        elif letter in "\"'":
            quote = letter
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if not depth:
                return at
        at += 1
    raise RecipeError(f"`{text}`: `{{` at {start} isn't closed")


def _piece(text: str, start: int, end: int) -> Piece:
    inside = text[start : end + 1]
    try:
        held = ast.literal_eval(inside)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise RecipeError(
            f"`{text}`: `{inside}` at {start} is no piece", hint='as in {"meta": "choice1"}'
        ) from None
    if not isinstance(held, dict) or len(held) != 1:
        raise RecipeError(f"`{text}`: `{inside}` at {start} takes one key: {', '.join(KINDS)}")
    (kind, said), *_ = held.items()
    if kind not in KINDS:
        close = did_you_mean(str(kind), KINDS, otherwise=f"it takes {', '.join(KINDS)}")
        raise RecipeError(f"`{text}`: `{kind}` at {start} is no piece of a target", hint=close)
    if not isinstance(said, str):
        raise RecipeError(f"`{text}`: `{kind}` at {start} takes text")
    return Piece(kind, said)


def _said(piece: Piece, values: Mapping[str, Any], where: str) -> str:
    if piece.kind == "text":
        return piece.said
    held = values
    meta = values.get("meta")
    if piece.kind == "meta" and isinstance(meta, Mapping) and piece.said in meta:
        held = meta
    if piece.said not in held:
        there = (
            [*values, *(f"meta.{name}" for name in meta)]
            if isinstance(meta, Mapping)
            else [*values]
        )
        raise InputError(
            f"{where}: it has no `{piece.said}`, of which the label's text is made",
            hint=did_you_mean(piece.said, there, otherwise=f"there are {', '.join(there)}"),
        )
    value = held[piece.said]
    if isinstance(value, str):
        return value
    if not isinstance(value, bool | int | float):
        raise InputError(f"{where}: `{piece.said}` is not text, of which the label's text is made")
    return json.dumps(value)
