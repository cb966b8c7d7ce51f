"""Refinement of knowledge-base words, and the search for words by likelihood ratio."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmkit.errors import InputError
from bmkit.prompting.labelwords import LabelWords, Word
from bmkit.verbalizers import automatic, refine


def made(*labels: list[list[int]]) -> LabelWords:
    words = tuple(tuple(Word(str(own), tuple(own)) for own in label) for label in labels)
    return LabelWords(tuple(f"l{i}" for i in range(len(labels))), words)


def ids(words: LabelWords) -> list[list[tuple[int, ...]]]:
    return [[word.ids for word in own] for own in words.words]


def probabilities(rows: int, width: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=draw, dtype=torch.float64) * 2).softmax(-1)


def test_words_with_a_rare_token_are_left_out_and_a_label_keeps_its_likeliest() -> None:
    prior = torch.tensor([0.3, 0.01, 0.25, 0.02, 0.2, 0.22]).log()
    words = made([[0], [1], [2, 3], [2]], [[1], [3], [1, 0]])
    assert ids(refine.frequent(words, prior)) == [[(0,), (2,)], [(3,)]]
    assert ids(refine.frequent(words, prior, candidate_frac=0)) == ids(words)
    assert ids(refine.frequent(words, prior, candidate_frac=1.0)) == [[(0,)], [(3,)]]


def test_relevance_is_the_cosine_with_the_own_label_over_the_mean_of_the_others() -> None:
    there = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    probs = probabilities(5, 9, seed=1).view(5, 3, 3)
    probs[:, ~there] = 0
    found = refine.relevance(probs.log(), there).tolist()

    def cosine(a: tuple[int, int], b: tuple[int, int]) -> float:
        left, right = ([probs[r, i, j].item() for r in range(5)] for i, j in (a, b))
        dot = sum(x * y for x, y in zip(left, right, strict=True))
        return dot / math.hypot(*left) / math.hypot(*right)

    for i, j in there.nonzero().tolist():
        others = [cosine((i, j), (k, 0)) for k in range(3) if k != i]
        assert math.isclose(found[i][j], cosine((i, j), (i, 0)) / (sum(others) / 2), rel_tol=1e-9)
    assert found[2][1] == 0


def test_words_that_go_with_other_labels_are_left_out_and_first_words_stay() -> None:
    # Over four rows the first label's word is likely in two of them, the second's in the others.
    one, two = [0.9, 0.8, 0.1, 0.1], [0.1, 0.1, 0.8, 0.9]
    probs = torch.tensor([[one, one, two], [two, two, two]]).movedim(-1, 0)
    words = made([[0], [1], [2]], [[3], [4], [5]])
    there = torch.ones(2, 3, dtype=torch.bool)
    assert ids(refine.relevant(words, probs.log(), there)) == [[(0,), (1,)], [(3,), (4,), (5,)]]
    assert ids(refine.relevant(words, probs.log(), there, least=1e9)) == [[(0,)], [(3,)]]
    single = made([[0], [1]])
    assert ids(refine.relevant(single, probs[:, :1, :2].log(), there[:1, :2])) == ids(single)


@given(st.integers(0, 99), st.booleans(), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_likelihood_ratios_are_those_of_a_loop_over_rows(
    seed: int, balanced: bool, classes: int
) -> None:
    probs = probabilities(9, 7, seed)
    labels = torch.tensor([*range(classes), *[0] * (9 - classes)])
    found = automatic.likelihood_ratios(probs.log(), labels, classes, balanced=balanced)
    for label in range(classes):
        own = [r for r in range(9) if labels[r] == label]
        others = [r for r in range(9) if labels[r] != label]
        weight = len(others) / len(own) if balanced else 1
        for token in range(7):
            score = 0.0
            for r in range(9):
                p = probs[r, token].item()
                odds = math.log(p) - math.log(1 - p)
                score += weight * odds if r in own else -odds
            assert math.isclose(found[label, token].item(), score, rel_tol=1e-6, abs_tol=1e-6)


def test_the_search_finds_the_words_that_tell_labels_apart() -> None:
    probs = torch.full((6, 10), 0.02)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    probs[:3, 4], probs[3:, 4] = 0.3, 0.1
    probs[:3, 7], probs[3:, 7] = 0.1, 0.3
    probs[:, 2] = 0.4  # likely everywhere: it tells nothing
    found = automatic.search(probs.log(), labels, 2)
    assert found.token_ids == [[4], [7]]
    assert found.scores[0][0] == pytest.approx(found.scores[1][0])
    allowed = torch.ones(10, dtype=torch.bool)
    allowed[4] = False
    again = automatic.search(probs.log(), labels, 2, allowed=allowed, exclusive=False)
    assert again.token_ids == [[0], [7]]  # of equals the lower token


def test_candidates_are_the_likeliest_over_the_rows_of_a_label() -> None:
    probs = torch.full((2, 6), 1e-4, dtype=torch.float64)
    probs[0, 0], probs[1, 0] = 1e-3, 1e-9  # tells most, but it is never likely
    probs[0, 3], probs[1, 3] = 0.5, 0.3
    probs[0, 5], probs[1, 5] = 0.3, 0.5
    labels = torch.tensor([0, 1])
    assert automatic.search(probs.log(), labels, 2).token_ids == [[0], [5]]
    few = automatic.search(probs.log(), labels, 2, num_candidates=2)
    assert few.token_ids == [[3], [5]]
    every = automatic.search(probs.log(), labels, 2, num_candidates=0, words_per_label=2)
    assert every.token_ids[0] == [0, 3]
    assert every.token_ids[1][0] == 5


def test_a_word_that_is_best_for_two_labels_goes_to_the_one_it_tells_best() -> None:
    probs = torch.tensor([[0.6, 0.1, 0.1], [0.5, 0.2, 0.1], [0.01, 0.1, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    both = automatic.search(probs.log(), labels, 3, exclusive=False)
    assert both.token_ids[0] == both.token_ids[1] == [0]
    assert automatic.search(probs.log(), labels, 3).token_ids == [[0], [1], [2]]


def test_probabilities_of_none_and_of_one_do_not_break_the_search() -> None:
    logprobs = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    found = automatic.search(logprobs, torch.tensor([0, 1]), 2)
    assert found.token_ids == [[0], [1]]
    assert all(math.isfinite(s) for own in found.scores for s in own)


@pytest.mark.parametrize(("labels", "classes"), [([0, 0], 1), ([0, 0], 2)])
def test_a_search_without_rows_of_every_label_is_refused(labels: list[int], classes: int) -> None:
    with pytest.raises(InputError, match="not all of them have rows"):
        automatic.search(torch.zeros(2, 4), torch.tensor(labels), classes)


def test_a_search_of_which_nothing_is_left_is_refused() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(InputError, match="no candidate"):
        automatic.search(torch.zeros(2, 4), torch.tensor([0, 1]), 2, allowed=nothing)


def test_found_words_are_label_words(tokenizer: Any) -> None:
    (paris,) = tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    found = automatic.Found([[paris], [5]], [[1.0], [0.5]])
    words = found.words(tokenizer, ["a", "b"])
    assert words.labels == ("a", "b")
    assert words.words[0] == (Word(" Paris", (paris,)),)


def test_whole_words_begin_with_a_space_and_have_letters_only(tokenizer: Any) -> None:
    allowed = automatic.whole_words(tokenizer)
    texts = {tokenizer.decode([i]) for i in allowed.nonzero().flatten().tolist()}
    assert " Paris" in texts
    assert all(t.startswith(" ") and t[1:].isalpha() and len(t) > 2 for t in texts)
    expected = {
        i
        for token, i in tokenizer.get_vocab().items()
        if token.startswith("Ġ") and len(token) > 2 and token[1:].isalpha()
    }
    assert expected == set(allowed.nonzero().flatten().tolist())
    assert len(automatic.whole_words(tokenizer, 500)) == 500
    assert automatic.whole_words(tokenizer, 300).sum() < len(expected)
