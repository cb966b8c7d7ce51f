"""The labels of a task, and few-shot samples of each."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmkit.data.classes import (
    Classes,
    count,
    require_classes,
    require_every_class,
    require_rows,
)
from bmkit.data.shots import sample
from bmkit.data.tabular import Record
from bmkit.errors import InputError, RecipeError


def record(number: int = 1, **values: Any) -> Record:
    return Record(f"x.jsonl:{number}", number, values)


def labelled(*labels: Any) -> list[Record]:
    return [record(i, text_a=f"row {i}", label=label) for i, label in enumerate(labels, 1)]


def test_a_list_of_labels_takes_names_or_places() -> None:
    classes = Classes.of(["negative", "positive"])
    found = [classes.number(r) for r in labelled("negative", " positive", "1", 0)]
    assert found == [0, 1, 1, 0]
    assert [Classes.of(["1", "0"]).number(r) for r in labelled("1", 0)] == [0, 1]


def test_a_mapping_leads_from_what_the_file_holds_to_names() -> None:
    stars = Classes.of({"1": "bad", "2": "bad", "5": "good", "true": "good"})
    assert stars.names == ("bad", "good")
    assert [stars.number(r) for r in labelled(1, "2", "5", True)] == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"x.jsonl:1: `bad` is none of the labels"):
        stars.number(labelled("bad")[0])


def test_labels_of_a_file_are_sorted_numbers_by_size() -> None:
    assert Classes.found(labelled("b", "a", 10, "9", False)).names == ("9", "10", "a", "b", "false")


def test_an_unknown_label_is_told_with_its_row_and_the_known_ones() -> None:
    classes = Classes.of(["negative", "positive"])
    with pytest.raises(InputError, match=r"x.jsonl:1: `positiv` is none of the labels") as caught:
        classes.number(labelled("positiv")[0])
    assert caught.value.hint == "did you mean `positive`?"
    with pytest.raises(InputError) as caught:
        classes.number(labelled("2")[0])
    assert caught.value.hint == "there are `negative`, `positive`"


@pytest.mark.parametrize("held", [None, "", "  ", 1.5, {"a": 1}, [None]])
def test_what_is_no_label_is_refused(held: object) -> None:
    with pytest.raises(InputError, match=r"x.jsonl:1: `label` holds .*no label"):
        Classes.of(["a", "b"]).several(labelled(held)[0])


def test_a_row_without_the_column_is_refused() -> None:
    with pytest.raises(InputError, match="it has no column `label`") as caught:
        Classes.of(["a", "b"]).number(record(text_a="t", labels="a"))
    assert caught.value.hint == "did you mean `labels`? data.columns says which one it is"


def test_a_row_may_have_several_labels() -> None:
    classes = Classes.of(["a", "b", "c"])
    rows = labelled(["c", "a", "c"], [], "b")
    assert [classes.several(r) for r in rows] == [(0, 2), (), (1,)]
    assert classes.several(labelled("c; a")[0], separator=";") == (0, 2)
    for row, told in zip(rows, ("2 labels", "no label"), strict=False):
        with pytest.raises(InputError, match=told):
            classes.number(row)
    assert count([classes.several(r) for r in rows], classes) == {"a": 1, "b": 1, "c": 1}


def test_clear_refusals_of_what_cannot_be_learned() -> None:
    with pytest.raises(InputError, match=r"data.test is empty"):
        require_rows([], "data.test")
    with pytest.raises(InputError, match="one label only, `a`"):
        require_classes(Classes.of(["a"]))
    with pytest.raises(InputError, match="no row of `b`: `a` has 2, `b` has 0"):
        require_every_class([0, 0], Classes.of(["a", "b"]), "data.train")
    with pytest.raises(RecipeError, match="`a` is named twice"):
        Classes.of(["a", "b", "a"])
    with pytest.raises(RecipeError, match="names no label"):
        Classes.of([])


TWO = Classes.of(["a", "b"])


def texts(rows: list[Record], places: list[int]) -> list[str]:
    return [rows[at].values["text_a"] for at in places]


@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_sample_has_as_many_rows_of_each_label_and_the_order_of_rows_does_not_matter(
    shots: int, seed: int, shuffle: random.Random
) -> None:
    rows = labelled(*("a" * 8 + "b" * 9))
    train, dev = sample(rows, [TWO.number(r) for r in rows], TWO, per_label=shots, seed=seed)
    for part in (train, dev):
        assert Counter(TWO.number(rows[at]) for at in part) == {0: shots, 1: shots}
    assert not set(train) & set(dev)
    mixed = shuffle.sample(rows, len(rows))
    again = sample(mixed, [TWO.number(r) for r in mixed], TWO, per_label=shots, seed=seed)
    assert [texts(mixed, part) for part in again] == [texts(rows, part) for part in (train, dev)]


def test_seeds_draw_different_rows_each_about_as_often() -> None:
    rows = labelled(*("ab" * 10))
    labels = [TWO.number(r) for r in rows]
    drawn = Counter(
        at for seed in range(400) for at in sample(rows, labels, TWO, total=5, seed=seed)[0]
    )
    assert len(drawn) == 20
    assert all(60 <= times <= 140 for times in drawn.values())  # 100 each, give or take 4.6 sigma


def test_rows_that_are_alike_are_drawn_once() -> None:
    rows = [record(i, text_a="same", label="a") for i in range(9)]
    rows += [record(9, text_a="other", label="a"), record(10, text_a="b", label="b")]
    labels = [TWO.number(r) for r in rows]
    train, dev = sample(rows, labels, TWO, total=1, seed=3)
    assert texts(rows, train) != texts(rows, dev)
    assert {*train, *dev} <= {0, 9, 10}  # the first of those that are alike
    with pytest.raises(InputError, match=r"too few rows for 2 of each label.*`a` has 2, `b` has 1"):
        sample(rows, labels, TWO, per_label=2, dev_like=False)


def test_too_few_rows_are_told_with_how_many_there_are() -> None:
    rows = labelled("a", "a", "b", "b", "a")
    labels = [TWO.number(r) for r in rows]
    assert sample(rows, labels, TWO, per_label=2, dev_like=False)[1] == []
    with pytest.raises(InputError, match="for 2 of each label, and as many for dev: `a` has 3"):
        sample(rows, labels, TWO, per_label=2)
    with pytest.raises(InputError, match="too few rows for 3, and as many for dev"):
        sample(rows, labels, TWO, total=3)
    for wrong in ({}, {"per_label": 1, "total": 1}, {"total": 0}):
        with pytest.raises(RecipeError):
            sample(rows, labels, TWO, **wrong)


def test_a_row_of_several_labels_counts_for_each() -> None:
    rows = labelled(["a", "b"], ["a"], ["b"], ["a", "b"])
    labels = [TWO.several(r) for r in rows]
    for seed in range(20):
        train, dev = sample(rows, labels, TWO, per_label=1, seed=seed)
        assert not {*train} & {*dev}
        for part in (train, dev):
            assert {n for at in part for n in labels[at]} == {0, 1}
