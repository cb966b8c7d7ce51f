"""Words with tags, and the spans that tags mark: `B-PER I-PER O`, or `PER PER O`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmkit.data.rows import require_text
from bmkit.data.tabular import Record
from bmkit.errors import InputError

OUTSIDE = "O"
"""The tag of a word that is in no span."""
TOKENS, TAGS = "tokens", "tags"


@dataclass(frozen=True, order=True)
class Span:
    """Words from `start` up to `end`, and what they are."""

    start: int
    end: int
    kind: str


def bare(tag: str) -> str:
    """Return a tag without what says where in a span it stands."""
    return tag[2:] if tag[:2] in ("B-", "I-") else tag


def spans(tags: Sequence[str], outside: str = OUTSIDE) -> list[Span]:
    """Return the spans of a row of tags.

    `B-` begins one, `I-` goes on with one of its kind or begins it. Of tags without either, those
    that are alike and follow each other are one.
    """
    found: list[Span] = []
    for at, tag in enumerate(tags):
        kind = bare(tag)
        if tag in (OUTSIDE, outside):
            continue
        last = found[-1] if found else None
        if last and last.end == at and last.kind == kind and not tag.startswith("B-"):
            found[-1] = Span(last.start, at + 1, kind)
        else:
            found.append(Span(at, at + 1, kind))
    return found


def candidates(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield all spans of `count` words that have `most` at most, from the left."""
    for start in range(count):
        for end in range(start + 1, min(start + most, count) + 1):
            yield start, end


def words_of(record: Record) -> list[str]:
    """Return a row's words: `tokens`, or those of a text.

    Raises InputError naming the row.
    """
    return _listed(record, TOKENS)


def tags_of(record: Record, words: Sequence[str]) -> list[str]:
    """Return a row's `tags`, one for each of its words. Raises InputError naming the row."""
    tags = _listed(record, TAGS)
    if len(tags) != len(words):
        raise InputError(
            f"{record.where}: it has {len(words)} tokens and {len(tags)} tags",
            hint="each token takes one",
        )
    return tags


def _listed(record: Record, key: str) -> list[str]:
    held = _held(record.values, key, record.where)
    listed = held.split() if isinstance(held, str) else held
    if not isinstance(listed, list) or not all(isinstance(one, str) and one for one in listed):
        raise InputError(f"{record.where}: `{key}` is no list of words, and no text")
    if not listed:
        raise InputError(f"{record.where}: `{key}` is empty")
    try:
        return [require_text(one) for one in listed]
    except ValueError as exc:
        raise InputError(f"{record.where}: `{key}`: {exc}") from None


def _held(values: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in values:
        there = ", ".join(f"`{name}`" for name in values) or "nothing"
        raise InputError(
            f"{where}: it has no `{key}`; it has {there}",
            hint="data.columns says which column it is",
        )
    return values[key]
