"""What a user says, as a recogniser of speech writes it: lower case, without punctuation."""

from __future__ import annotations

import re
from dataclasses import replace

from bmkit.data.slices.dialogue import Dialogue

_MARKS = re.compile(r"[^\w\s']|_")
_QUOTES = re.compile(r"(?<!\w)'|'(?!\w)")


def unpunctuated(text: str) -> str | None:
    """Return words in lower case; an apostrophe stays within a word. None if no word is left."""
    bare = _QUOTES.sub(" ", _MARKS.sub(" ", text.replace("’", "'")))  # noqa: RUF001
    return " ".join(bare.split()).lower() or None


def without_punctuation(dialogue: Dialogue) -> Dialogue:
    """Return a dialogue whose user has no punctuation; what the agent says stays."""
    slices = tuple(
        one if one.user is None else replace(one, user=unpunctuated(one.user))
        for one in dialogue.slices
    )
    return replace(dialogue, slices=slices)
