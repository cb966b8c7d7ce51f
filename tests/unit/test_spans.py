"""Tags of words: the spans that they mark, what is asked about them, and what is measured."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from bmkit.data.classes import Classes
from bmkit.data.spans import Span, candidates, spans, tags_of, words_of
from bmkit.data.tabular import Record
from bmkit.errors import InputError
from bmkit.prompt.tagging import Place, Tagged, Tagger, measure
from bmkit.prompt.tasks import Tagging

LABELS = Classes.of({"PER": "person", "LOC": "place", "O": "nothing"})


def row(words: str, tags: str, line: int = 1) -> Record:
    return Record(f"x.jsonl:{line}", line, {"tokens": words.split(), "tags": tags.split()})


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("B-A I-A O B-B", [(0, 2, "A"), (3, 4, "B")]),
        ("B-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("I-A I-A I-B", [(0, 2, "A"), (2, 3, "B")]),
        ("B-A O I-A", [(0, 1, "A"), (2, 3, "A")]),
        ("A A B O A", [(0, 2, "A"), (2, 3, "B"), (4, 5, "A")]),
        ("O O", []),
    ],
)
def test_tags_mark_spans(tags: str, wanted: list[tuple[int, int, str]]) -> None:
    assert spans(tags.split()) == [Span(*one) for one in wanted]


def test_candidates_are_all_runs_of_words_that_are_short_enough() -> None:
    pairs = itertools.combinations(range(6), 2)
    assert sorted(candidates(5, 3)) == [(a, b) for a, b in pairs if b - a <= 3]


def test_each_run_has_its_label_and_what_is_nothing_is_drawn() -> None:
    records = [row("Ann Lee is in Rome", "B-PER I-PER O O B-LOC"), row("it is x", "O O O", 2)]
    tagger = Tagger(Tagging(max_words=2, negatives=1.5), LABELS, "nothing")
    places = tagger.places(records)
    right = tagger.right(records, places)
    named = {(p.row, p.start, p.end): LABELS.names[r] for p, r in zip(places, right, strict=True)}
    assert named[0, 0, 2] == "person"
    assert named[0, 4, 5] == "place"
    assert named[0, 0, 1] == "nothing"
    assert len(named) == 9 + 5
    made = tagger.records(records, places)
    assert (made[1].values["text_a"], made[1].values["span"]) == ("Ann Lee is in Rome", "Ann Lee")
    kept = tagger.sampled(places, right, seed=3)
    assert kept == tagger.sampled(places, right, seed=3)
    assert sorted(LABELS.names[right[at]] for at in kept) == [*["nothing"] * 3, "person", "place"]


def test_the_likeliest_runs_are_kept_that_do_not_overlap() -> None:
    tagger = Tagger(Tagging(max_words=2), LABELS, "nothing")
    places = [Place(0, *pair) for pair in candidates(4, 2)]
    said = {(0, 1): (0, 0.6), (0, 2): (1, 0.7), (1, 3): (0, 0.9), (3, 4): (2, 0.99)}
    labels = [said.get((p.start, p.end), (2, 0.5))[0] for p in places]
    logprobs = [math.log(said.get((p.start, p.end), (2, 0.5))[1]) for p in places]
    (found,) = tagger.told([4], places, labels, logprobs)
    assert found.spans == [Span(0, 1, "person"), Span(1, 3, "person")]
    assert found.names == ["person", "person", "person", "nothing"]


def test_words_are_told_one_by_one_with_or_without_marks() -> None:
    marked = Classes.of(["B-PER", "I-PER", "O"])
    tagger = Tagger(Tagging(unit="tokens"), marked, "O")
    record = row("Ann Bob Lee x", "B-PER B-PER I-PER O")
    places = tagger.places([record])
    right = tagger.right([record], places)
    assert right == [0, 0, 1, 2]
    assert tagger.told([4], places, right, [0.0] * 4) == [tagger.tagged(record)]
    assert tagger.tagged(record).spans == [Span(0, 1, "PER"), Span(1, 3, "PER")]
    plain = Tagger(Tagging(unit="tokens"), LABELS, "nothing")
    (found,) = plain.told([4], places, plain.right([record], places), [0.0] * 4)
    assert found.spans == [Span(0, 3, "person")], "without marks neighbours are one"
    assert plain.tagged(record).spans == [Span(0, 1, "person"), Span(1, 3, "person")]


def test_figures_are_those_of_words_and_of_whole_spans() -> None:
    right = [Tagged(["A", "A", "O", "B"], [Span(0, 2, "A"), Span(3, 4, "B")])]
    told = [Tagged(["A", "O", "B", "B"], [Span(0, 1, "A"), Span(2, 3, "B"), Span(3, 4, "B")])]
    figures, lines = measure(told, right)
    assert figures["accuracy"] == 0.5
    precision, recall = 1 / 3, 1 / 2
    micro = 2 * precision * recall / (precision + recall)
    assert figures["micro_f1"] == pytest.approx(micro, abs=1e-6)
    assert figures["macro_f1"] == pytest.approx((0 + 2 / 3) / 2, abs=1e-6)
    assert lines[1] == {"step": "B", "rows": 1, "told": 2, "right": 1, "f1": 0.666667}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tags": ["O"]}, "it has no `tokens`; it has `tags`"),
        ({"tokens": [], "tags": []}, "`tokens` is empty"),
        ({"tokens": "a b", "tags": ["O"]}, "it has 2 tokens and 1 tags"),
        ({"tokens": "a", "tags": [3]}, "`tags` is no list of words"),
        ({"tokens": "a", "tags": ["B-PERS"]}, "the tag `B-PERS` is none of the labels"),
    ],
)
def test_a_row_of_words_that_is_wrong_is_named(values: dict[str, Any], said: str) -> None:
    record = Record("x.jsonl:7", 7, values)
    tagger = Tagger(Tagging(), LABELS, "nothing")
    with pytest.raises(InputError) as caught:
        tags_of(record, words_of(record))
        tagger.tagged(record)
    assert str(caught.value).startswith(f"x.jsonl:7: {said}") or said in str(caught.value)
