"""Text to slices: a user's by words, an agent's by about how many tokens it has."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_UNIT = re.compile(r"\s*\S+")
_PART = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")
LETTERS = 7
"""Letters of a word that most vocabularies have as one token."""


def by_words(text: str, sizes: Sequence[int], draw: random.Random) -> list[str]:
    """Return a user's text in slices of `sizes[0]` to `sizes[1]` words, as it is drawn.

    The words are all there, in their order, a space between them. The last slice may be shorter;
    one word that would be left over is said with those before it in half of the cases, if there
    is room.
    """
    words = text.split()
    fewest, most = sizes[0], sizes[1]
    found: list[str] = []
    at = 0
    while at < len(words):
        size = draw.randint(fewest, most)
        if len(words) - at - size == 1 and fewest > 1 and size < most and draw.random() < 0.5:
            size += 1
        found.append(" ".join(words[at : at + size]))
        at += size
    return found


def by_tokens(text: str, tokens: int) -> list[str]:
    """Return an agent's text in pieces of about `tokens` tokens, divided between words.

    Joined, they are the text: each has its own leading space. A word of more tokens is a piece by
    itself.
    """
    found: list[str] = []
    room = 0
    units = _UNIT.findall(text)
    if units:
        units[-1] += text[sum(map(len, units)) :]
    for unit in units:
        need = about(unit)
        if not found or need > room:
            found.append("")
            room = tokens
        found[-1] += unit
        room -= need
    return found


def about(text: str) -> int:
    """Return about how many tokens a text has: a digit or a sign is one, a long word several."""
    return sum(1 + (len(part) - 1) // LETTERS for part in _PART.findall(text))
