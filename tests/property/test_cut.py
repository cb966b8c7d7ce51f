"""Text in slices: nothing is lost, nothing is said twice, and no slice is too long."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from bmkit.data.slices import cut
from bmkit.duplex import speech

WORDS = st.lists(st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1))
SPACES = st.sampled_from([" ", "  ", "\n", " \n\n", "\t"])


@given(WORDS, st.integers(1, 4), st.integers(0, 3), st.integers())
def test_a_users_words_are_all_there_in_their_order(
    words: list[str], fewest: int, more: int, seed: int
) -> None:
    found = cut.by_words(" ".join(words), (fewest, fewest + more), random.Random(seed))
    assert " ".join(found).split() == " ".join(words).split()
    sizes = [len(part.split()) for part in found]
    assert all(fewest <= size <= fewest + more for size in sizes[:-1])
    assert all(1 <= size <= fewest + more for size in sizes)


@given(WORDS, SPACES, st.integers(1, 12))
def test_an_agents_pieces_are_its_text(words: list[str], space: str, tokens: int) -> None:
    text = space.join(words)
    found = cut.by_tokens(text, tokens)
    assert "".join(found) == (text if text.strip() else "")
    assert all(piece.strip() for piece in found)
    long = [piece for piece in found if cut.about(piece) > tokens]
    assert all(len(piece.split()) == 1 for piece in long)


@given(
    st.lists(st.from_regex(r"[A-Za-z']*[a-z][.,?!]?", fullmatch=True), min_size=1), st.integers()
)
def test_a_disfluent_text_has_its_words_in_order(words: list[str], seed: int) -> None:
    said = speech.disfluent(" ".join(words), random.Random(seed)).lower()
    left = iter([word.strip(",") for word in said.split()])
    assert all(word.lower().strip(",") in left for word in words)


@given(st.text())
def test_without_punctuation_there_are_words_and_small_letters(text: str) -> None:
    found = speech.unpunctuated(text)
    if found != text:
        assert not set('!?;"') & set(found)
        assert found == found.lower()
        assert found == " ".join(found.split())
