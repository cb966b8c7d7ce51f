"""Tags of words, told by a prompt for each run of words or each word.

With runs (TemplateNER, arXiv 2106.01760) a prompt asks what each of up to `max_words` words is; of
those that are something the likeliest are kept that don't overlap. No torch here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bmkit.data.classes import Classes
from bmkit.data.spans import OUTSIDE, Span, bare, candidates, spans, tags_of, words_of
from bmkit.data.tabular import Record
from bmkit.errors import InputError, did_you_mean
from bmkit.prompt.measure import Row, f1
from bmkit.prompt.tasks import Tagging

LABEL = "label"


@dataclass(frozen=True)
class Place:
    """The words that one prompt is about."""

    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Tagged:
    """A row's words, by their labels: one each, and as spans. Both are of names."""

    names: list[str]
    spans: list[Span]


class Tagger:
    """Turns rows of words into those that a prompt is made of, and back."""

    def __init__(self, spec: Tagging, known: Classes, none: str | None) -> None:
        """Take the labels; `none` is that of words which are nothing."""
        self.spec, self.known = spec, known
        self.none = none or OUTSIDE

    def places(self, records: Sequence[Record]) -> list[Place]:
        """Return what prompts are made for: all of it. Raises InputError naming a row."""
        found = []
        for row, record in enumerate(records):
            count = len(words_of(record))
            most = self.spec.max_words if self.spec.unit == "spans" else 1
            found += [Place(row, start, end) for start, end in candidates(count, most)]
        return found

    def right(self, records: Sequence[Record], places: Iterable[Place]) -> list[int]:
        """Return the label of each place. Raises InputError naming a row with an unknown tag."""
        held = [self._labels(record) for record in records]
        found = []
        for place in places:
            names, own = held[place.row]
            if self.spec.unit == "tokens":
                found.append(self.known.names.index(names[place.start]))
                continue
            there = {(span.start, span.end): span.kind for span in own}
            name = there.get((place.start, place.end), self.none)
            found.append(self.known.names.index(name))
        return found

    def records(self, records: Sequence[Record], places: Iterable[Place]) -> list[Record]:
        """Return a row for each place, with its sentence as `text_a` and its words as `span`."""
        words = [words_of(record) for record in records]
        found = []
        for place in places:
            record, own = records[place.row], words[place.row]
            span = " ".join(own[place.start : place.end])
            values = {"text_a": " ".join(own), **record.values, "span": span}
            found.append(replace(record, values=values))
        return found

    def sampled(self, places: Sequence[Place], right: Sequence[int], seed: int) -> list[int]:
        """Return which places are learned from: those that are something, and some that aren't."""
        if self.spec.unit == "tokens":
            return list(range(len(places)))
        none = self.known.names.index(self.none)
        nothing = [at for at, label in enumerate(right) if label == none]
        count = round(self.spec.negatives * (len(places) - len(nothing)))
        drawn = random.Random(seed).sample(nothing, min(count, len(nothing)))
        return sorted({*drawn, *(at for at, label in enumerate(right) if label != none)})

    def tagged(self, record: Record) -> Tagged:
        """Return what a row's own tags say."""
        names, own = self._labels(record)
        return Tagged([bare(name) for name in names], own)

    def told(
        self,
        counts: Sequence[int],
        places: Sequence[Place],
        labels: Sequence[int],
        logprobs: Sequence[float],
    ) -> list[Tagged]:
        """Return what rows of `counts` words are, by the label of each place, and how likely."""
        names = self.known.names
        said = [[self.none] * count for count in counts]
        if self.spec.unit == "tokens":
            for place, label in zip(places, labels, strict=True):
                said[place.row][place.start] = names[label]
            return [Tagged([bare(n) for n in own], spans(own, self.none)) for own in said]
        kept: list[list[Span]] = [[] for _ in counts]
        order = sorted(range(len(places)), key=lambda at: (-logprobs[at], at))
        for at in order:
            place, name = places[at], names[labels[at]]
            own = said[place.row]
            if name != self.none and set(own[place.start : place.end]) == {self.none}:
                own[place.start : place.end] = [name] * (place.end - place.start)
                kept[place.row].append(Span(place.start, place.end, name))
        return [Tagged(own, sorted(held)) for own, held in zip(said, kept, strict=True)]

    def _labels(self, record: Record) -> tuple[list[str], list[Span]]:
        """Return the label of each word, and the spans that a row's tags mark."""
        tags = tags_of(record, words_of(record))
        names = [self._name(record, tag) for tag in tags]
        whole = self.spec.unit == "tokens" and any(bare(n) != n for n in self.known.names)
        if whole:
            return names, spans(names, self.none)
        marked = [
            tag[:2] + name if bare(tag) != tag else name
            for tag, name in zip(tags, names, strict=True)
        ]
        marked = [
            self.none if name == self.none else mark
            for name, mark in zip(names, marked, strict=True)
        ]
        return names, spans(marked, self.none)

    def _name(self, record: Record, tag: str) -> str:
        numbers, names = self.known.numbers, self.known.names
        if tag in numbers or bare(tag) in numbers:
            return names[numbers.get(tag, numbers.get(bare(tag), 0))]
        if tag in (OUTSIDE, self.none) and self.none in names:
            return self.none
        raise InputError(
            f"{record.where}: the tag `{tag}` is none of the labels",
            hint=did_you_mean(bare(tag), names, otherwise=f"there are {', '.join(names)}"),
        )


def measure(told: Sequence[Tagged], right: Sequence[Tagged]) -> tuple[dict[str, float], list[Row]]:
    """Return the figures of tagged rows, and a line for each kind of span.

    `accuracy` is the share of words that are told rightly; `micro_f1` that of spans, which count
    if their ends and their kind are right; `macro_f1` the mean of the kinds'.
    """
    pairs = [
        (a, b)
        for t, r in zip(told, right, strict=True)
        for a, b in zip(t.names, r.names, strict=True)
    ]
    found = {(row, span) for row, own in enumerate(told) for span in own.spans}
    there = {(row, span) for row, own in enumerate(right) for span in own.spans}
    lines: list[Row] = []
    scores = []
    for kind in sorted({span.kind for _, span in found | there}):
        mine, theirs = ({one for one in held if one[1].kind == kind} for held in (found, there))
        hit = len(mine & theirs)
        scores.append(f1(hit, len(mine ^ theirs)))
        counts = {"rows": len(theirs), "told": len(mine), "right": hit}
        lines.append({"step": kind, **counts, "f1": round(scores[-1], 6)})
    figures = {
        "accuracy": sum(a == b for a, b in pairs) / max(len(pairs), 1),
        "macro_f1": sum(scores) / max(len(scores), 1),
        "micro_f1": f1(len(found & there), len(found ^ there)),
    }
    return {name: round(value, 6) for name, value in figures.items()}, lines
