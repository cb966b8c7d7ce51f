"""What a template is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Words that stand in every prompt. `space`: a blank is written before them."""

    text: str
    space: bool = False
    shortenable: bool = False


@dataclass(frozen=True)
class Placeholder:
    """A row's text, by its key; `post_processing` are names of filters."""

    name: str
    space: bool = False
    shortenable: bool = True
    post_processing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Meta:
    """A word that belongs to a row, by its key; it isn't shortened unless that is asked for."""

    name: str
    space: bool = False
    shortenable: bool = False
    post_processing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mask:
    """A place that the model is to fill in."""

    space: bool = False


@dataclass(frozen=True)
class Soft:
    """Trainable tokens: one that is drawn at random, or those that `word` begins as.

    There are `duplicate` of them: different ones, or with `same` one that is repeated. By its
    `soft_id` a later piece uses them again.
    """

    word: str | None = None
    space: bool = False
    duplicate: int = 1
    same: bool = False
    soft_id: int | None = None


@dataclass(frozen=True)
class Again:
    """The trainable tokens of an earlier piece."""

    soft_id: int
    space: bool = False


@dataclass(frozen=True)
class Special:
    """A special token, by its role (`<eos>`) or by what the tokenizer calls it."""

    token: str
    space: bool = False


@dataclass(frozen=True)
class Scaffold:
    """What a chat template puts around messages. The mini-language can't write it."""

    text: str
    space: bool = False


Piece = Text | Placeholder | Meta | Mask | Soft | Again | Special | Scaffold

OPTIONS: dict[str, tuple[str, ...]] = {
    "placeholder": ("shortenable", "post_processing"),
    "meta": ("shortenable", "post_processing"),
    "mask": ("shortenable",),
    "soft": ("duplicate", "same", "soft_id", "shortenable"),
    "soft_id": ("shortenable",),
    "special": ("shortenable",),
    "text": ("shortenable",),
}
"""Kinds of pieces, by the key that says them, and what else each may say."""

MOST_SOFT = 10_000
"""A bound on `duplicate`: no context is as long."""
