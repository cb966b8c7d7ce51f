"""What a user says, cut into slices by the time when it is heard."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bmkit.data.slices.transcript import Said

_ALONE = "\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f\u0e00-\u0eff"
"""Characters of scripts that put no spaces between words: each is a piece of its own."""
_PIECE = re.compile(rf"\s*(?:[{_ALONE}]|[^\s{_ALONE}]+)")


@dataclass(frozen=True)
class Words:
    """Some of the words that a user has said in one go, which `key` names: a revision does too."""

    key: int
    text: str


@dataclass(frozen=True)
class Revision:
    """What the words of a key turned out to be."""

    key: int
    text: str


@dataclass(frozen=True)
class Heard:
    """What is heard in one slice of time."""

    number: int
    parts: tuple[Words, ...] = ()
    revisions: tuple[Revision, ...] = ()
    """Of earlier slices, known before this one is answered."""

    @property
    def text(self) -> str | None:
        """Return all words; None is silence."""
        return joined(self.parts)


def joined(parts: Sequence[Words]) -> str | None:
    """Return the text of a slice's words; None if there are none."""
    return " ".join(p.text for p in parts if p.text) or None


def pieces(text: str) -> list[str]:
    """Return the words of a text, each with the space before it; without the space behind all."""
    return _PIECE.findall(text)


def by_time(said: Sequence[Said], period_ms: int) -> list[Heard]:
    """Cut what was said into slices of `period_ms`, silent ones among them.

    The words of a `Said` are spread evenly from `t` to `t_end`; one is heard once it is over.
    A `Said` that takes the place of an earlier one is a revision, which is known at its `t_end`:
    words that were not heard until then are never heard, the new ones stand in their place.
    """
    parts: dict[int, list[Words]] = {}
    revisions: dict[int, list[Revision]] = {}
    known: set[int] = set()
    for one in said:
        if one.t in known and one.rev:
            number = _slice(one.t_end, period_ms)
            if (heard := _put(parts, one, number)) is not None:
                revisions.setdefault(number, []).append(Revision(one.t, heard))
            continue
        known.add(one.t)
        for number, text in _spread(one, period_ms):
            parts.setdefault(number, []).append(Words(one.t, text))
    last = max((*parts, *revisions), default=-1)
    return [
        Heard(number, tuple(parts.get(number, ())), tuple(revisions.get(number, ())))
        for number in range(last + 1)
    ]


def _put(parts: dict[int, list[Words]], said: Said, known: int) -> str | None:
    """Put the words of a revision where those of its key wait to be heard: from slice `known` on.

    Returns what those that were heard before are to become; None if there are none, or they stay.
    """
    places = [
        (number, part) for number in sorted(parts) for part in parts[number] if part.key == said.t
    ]
    heard = [part for number, part in places if number < known]
    if len(heard) == len(places):
        return said.text
    words = pieces(said.text)
    count = sum(len(pieces(part.text)) for part in heard)
    before, words = words[:count], words[count:]
    for number, part in places[len(heard) :]:
        count = len(words) if part is places[-1][1] else len(pieces(part.text))
        new = Words(said.t, "".join(words[:count]).strip())
        parts[number] = [new if p is part else p for p in parts[number]]
        words = words[count:]
    same = before == [word for part in heard for word in pieces(part.text)]
    return None if same else "".join(before).strip()


def _spread(said: Said, period_ms: int) -> Iterator[tuple[int, str]]:
    """Yield the slices in which words are heard, and the words."""
    words = pieces(said.text)
    found: dict[int, list[str]] = {}
    for place, word in enumerate(words, 1):
        time = said.t + (said.t_end - said.t) * place // len(words)
        found.setdefault(_slice(time, period_ms), []).append(word)
    for number, mine in found.items():
        yield number, "".join(mine).strip()


def _slice(time: int, period_ms: int) -> int:
    """Return the slice in which a time lies; where one ends, that one."""
    return max(-(-time // period_ms) - 1, 0)
