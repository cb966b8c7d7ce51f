"""Measures of said texts, against their definitions."""

from __future__ import annotations

import itertools
import random

import pytest

from bmkit.verbalizers import overlap


def longest(mine: list[str], theirs: list[str]) -> int:
    """The longest common subsequence, by trying all of them."""
    for size in range(len(mine), 0, -1):
        for own in itertools.combinations(mine, size):
            rest = iter(theirs)
            if all(word in rest for word in own):
                return size
    return 0


def test_rouge_l_is_that_of_the_longest_common_subsequence() -> None:
    draw = random.Random(0)
    for _ in range(60):
        mine, theirs = (draw.choices("abcd", k=draw.randint(1, 7)) for _ in range(2))
        hits = longest(mine, theirs)
        precision, recall = hits / len(mine), hits / len(theirs)
        wanted = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert overlap.rouge_l(" ".join(mine), ", ".join(theirs)) == pytest.approx(wanted)


def test_the_example_of_the_paper_comes_out() -> None:
    # Lin 2004: "police killed the gunman" and two candidates, with beta = 1.
    assert overlap.rouge_l("police kill the gunman", "Police killed the gunman.") == 0.75
    assert overlap.rouge_l("the gunman kill police", "police killed the gunman") == 0.5


def test_token_f1_counts_words_in_any_order_and_no_articles() -> None:
    assert overlap.token_f1("The old, old city", "a city of old Rome") == pytest.approx(4 / 7)
    assert overlap.token_f1("x", "y") == 0.0
    assert overlap.token_f1("", "") == overlap.token_f1("the", "The") == 1.0
    assert overlap.token_f1("", "x") == overlap.rouge_l("", "x") == 0.0


def test_an_exact_match_has_the_same_words() -> None:
    assert overlap.exact_match(" The Rome!", "rome") == 1.0
    assert overlap.exact_match("Rome Oslo", "Oslo Rome") == 0.0


def test_of_several_texts_the_best_counts() -> None:
    found = overlap.measure(["Rome", "x y"], [["Oslo", "Rome"], ["x"]])
    assert found == {
        "exact_match": 0.5,
        "token_f1": round((1 + 2 / 3) / 2, 6),
        "rouge_l": round((1 + 2 / 3) / 2, 6),
    }
