"""`infer` on a prompt that tells tags: rows of words in, each with its tags and spans out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bmkit.data.classes import Classes
from bmkit.data.rows import BadRow, Row
from bmkit.data.spans import TOKENS, Span, words_of
from bmkit.data.tabular import Record
from bmkit.prompt.answer import Asked, Session
from bmkit.prompt.tagging import Place, Tagged, Tagger
from bmkit.prompting.encode import Encoded


@dataclass(frozen=True)
class ToldTags:
    """One row of words, and what they are."""

    streamed: ClassVar = False
    id: Any
    words: list[str]
    tagged: Tagged
    probabilities: Mapping[tuple[int, int], float]
    """Of the label of what a prompt was asked about, by its first word and the one behind it."""

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "id": self.id,
            "tokens": self.words,
            "tags": self.tagged.names,
            "spans": [self._span(span) for span in self.tagged.spans],
        }

    def _span(self, span: Span) -> dict[str, Any]:
        """Return a span; of one that was told word by word, the least probability counts."""
        parts = [(at, at + 1) for at in range(span.start, span.end)]
        whole = self.probabilities.get((span.start, span.end))
        likely = min(self.probabilities[part] for part in parts) if whole is None else whole
        text = " ".join(self.words[span.start : span.end])
        where = {"start": span.start, "end": span.end, "text": text}
        return {"label": span.kind, **where, "probability": round(likely, 6)}

    def line(self) -> str:
        """Return what is printed as text."""
        found = [f"{span['label']}: {span['text']}" for span in self.values()["spans"]]
        return json.dumps(found, ensure_ascii=False)


class TagSession(Session):
    """A prompt on its model, that tells tags of words."""

    @property
    def tagger(self) -> Tagger:
        """Return what makes prompts of words."""
        return Tagger(self.kept.tagging, Classes.of(self.kept.labels), self.kept.none)

    def _read(self, number: int, row: Row) -> Asked | BadRow:
        if set(row.values) - {"id"} == {"prompt"}:
            id_ = row.values.get("id", number)
            row = Row(row.line, {"id": id_, TOKENS: row.values["prompt"]})
        return super()._read(number, row)

    def _encoded(self, record: Record) -> list[Encoded]:
        places = self.tagger.places([record])
        return self.prompts.encode(self.tagger.records([record], places))

    def _tell(self, asked: list[Asked]) -> Sequence[ToldTags]:
        prompts = [prompt for found in asked for prompt in found.encoded]
        labels = self.verbalizer.label_logprobs(self.verbalizer.ask(self.opened.asker, prompts))
        chosen = [own[0] for own in self.verbalizer.chosen(labels)]
        likely = labels.amax(-1)
        records = [found.record for found in asked]
        places: list[Place] = self.tagger.places(records)
        words = [words_of(record) for record in records]
        told = self.tagger.told([*map(len, words)], places, chosen, likely.tolist())
        shares: list[dict[tuple[int, int], float]] = [{} for _ in asked]
        for place, share in zip(places, likely.exp().tolist(), strict=True):
            shares[place.row][place.start, place.end] = share
        return [
            ToldTags(found.id, own, tagged, share)
            for found, own, tagged, share in zip(asked, words, told, shares, strict=True)
        ]
