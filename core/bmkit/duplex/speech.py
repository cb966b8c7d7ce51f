"""How written words become spoken ones: without punctuation, with fillers and repetitions."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from bmkit.duplex.english import OPEN, STARTS

FILLERS = ("um", "um", "uh", "uh", "er", "like", "you know", "I mean", "well", "hm")
OPENERS = (
    "um",
    "so",
    "okay so",
    "hey",
    "well",
    "uh",
    "right",
    "oh",
    "hi",
    "okay",
    "hmm",
    "alright",
)
ENDS = (".", "?", "!", ":", ";", "…")
_MARKS = re.compile(r"(?<!\d)[.,:]|[.,:](?!\d)|[!?;…\"“”()\[\]«»]")
_DASHES = re.compile("(?<!\\S)-+(?!\\S)|[\u2013\u2014]")
_QUOTES = re.compile("(?<!\\w)['\u2018\u2019]|['\u2018\u2019](?!\\w)")


def unpunctuated(text: str) -> str:
    """Return what a recogniser of speech would have written: lower case, words alone.

    Signs within words and numbers stay: `don't`, `3.5`, `10:30`. A text of signs stays as it is.
    """
    plain = _DASHES.sub(" ", _MARKS.sub(" ", text))
    plain = " ".join(_QUOTES.sub("", plain).lower().split())
    return plain or text


def disfluent(text: str, draw: random.Random) -> str:
    """Return a text with a filler, a repeated word or a new start; its words stay in order."""
    words = text.split()
    if len(words) < 4:
        return text
    way = draw.choice(("opener", "filler", "filler", "repeat", "restart"))
    if way == "opener":
        return " ".join((draw.choice(OPENERS).capitalize() + ",", *_lowered(words)))
    at = draw.randrange(1, len(words) - 1)
    if words[at - 1].endswith((*ENDS, ",")):
        return text
    if way == "filler":
        return " ".join((*words[:at], f"{draw.choice(FILLERS)},", *words[at:]))
    if way == "repeat" and words[at].lower() not in OPEN:
        return text
    first = 0 if way == "restart" else at
    again = words[first : first + (2 if way == "restart" else 1)]
    if any(word.endswith((*ENDS, ",")) for word in again):
        return text
    said = [*again[:-1], f"{again[-1]},"]
    return " ".join(
        (
            *words[:first],
            *said,
            *(_lowered(again) if not first else again),
            *words[first + len(again) :],
        )
    )


def _lowered(words: list[str]) -> list[str]:
    """Return words with a small first letter, unless it is `I` or a name for all that's known."""
    first = words[0]
    if first.partition("'")[0] in STARTS:
        return [first[0].lower() + first[1:], *words[1:]]
    return list(words)


@dataclass(frozen=True)
class Voice:
    """How the user of one dialogue speaks."""

    punctuated: bool
    disfluent: float
    draw: random.Random

    def query(self, text: str) -> str:
        """Return what is asked, as this user says it."""
        text = " ".join(text.split())
        if self.disfluent and self.draw.random() < self.disfluent:
            text = disfluent(text, self.draw)
        return self.said(text)

    def said(self, text: str) -> str:
        """Return other words of this user."""
        return text if self.punctuated else unpunctuated(text)

    def joined(self, first: str, then: str) -> str:
        """Return two parts of what is said in one go; a capital behind a comma becomes small."""
        words = then.split()
        if not first or not words:
            return first or then
        return " ".join((first, *(words if first.endswith(ENDS) else _lowered(words))))
