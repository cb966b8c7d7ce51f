"""What a user says, cut into slices by the time when it is heard."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bmkit.data.slices.slicer import Revision, Words, by_time, pieces
from bmkit.data.slices.transcript import Said


def texts(said: list[Said], period_ms: int) -> list[str | None]:
    return [heard.text for heard in by_time(said, period_ms)]


def test_words_are_spread_over_the_time_in_which_they_are_said() -> None:
    said = [Said(0, 1850, "can you tell me"), Said(1900, 3100, "about penguins")]
    assert texts(said, 1000) == ["can you", "tell me", "about", "penguins"]
    assert texts(said, 2000) == ["can you tell me", "about penguins"]


def test_a_word_is_heard_once_it_is_over() -> None:
    assert texts([Said(0, 1000, "one")], 1000) == ["one"]
    assert texts([Said(0, 1001, "one")], 1000) == [None, "one"]
    assert texts([Said(0, 0, "one")], 1000) == ["one"]
    assert texts([Said(2000, 2000, "one")], 1000) == [None, "one"]


def test_pauses_are_silent_slices() -> None:
    assert texts([Said(0, 500, "so"), Said(3200, 3900, "go on")], 1000) == [
        "so",
        None,
        None,
        "go on",
    ]


def test_several_that_speak_in_one_slice_are_heard_in_turn() -> None:
    (heard,) = by_time([Said(0, 400, "so"), Said(500, 900, "go on")], 1000)
    assert heard.parts == (Words(0, "so"), Words(500, "go on"))
    assert heard.text == "so go on"


def test_a_revision_is_known_when_it_ends() -> None:
    said = [Said(0, 900, "their you are", rev=0), Said(0, 2400, "there you are", rev=1)]
    found = by_time(said, 1000)
    assert [heard.revisions for heard in found] == [(), (), (Revision(0, "there you are"),)]
    assert [heard.text for heard in found] == ["their you are", None, None]


def test_what_a_revision_replaces_before_it_is_heard_is_never_heard() -> None:
    said = [Said(1900, 3100, "about penguins"), Said(1900, 3400, "about pelicans", rev=1)]
    found = by_time(said, 1000)
    assert [heard.text for heard in found] == [None, None, "about", "pelicans"]
    assert not any(heard.revisions for heard in found)
    said = [Said(0, 4000, "a b c d"), Said(0, 2500, "A b", rev=1)]
    found = by_time(said, 1000)
    assert [heard.revisions for heard in found] == [(), (), (Revision(0, "A b"),), ()]
    assert [heard.text for heard in found] == ["a", "b", None, None]
    assert texts([*said, Said(0, 3500, "w x y z", rev=2)], 1000) == ["a", "b", None, "y z"]


def test_a_revision_known_before_anything_was_heard_stands_where_the_words_would() -> None:
    said = [Said(0, 3000, "a b c"), Said(0, 900, "x y z w", rev=1)]
    assert texts(said, 1000) == ["x", "y", "z w"]


def test_a_revision_of_nothing_is_said_for_the_first_time() -> None:
    assert texts([Said(0, 900, "there", rev=2)], 1000) == ["there"]


def test_scripts_without_spaces_are_divided_all_the_same() -> None:
    assert texts([Said(0, 2000, "今日は何です")], 1000) == ["今日は", "何です"]


@given(st.text())
def test_pieces_are_the_whole_text(text: str) -> None:
    assert "".join(pieces(text)) == text.rstrip() or not text.strip()


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 4000), st.text("ab 日", max_size=9))),
    st.integers(1, 3000),
)
def test_every_word_is_heard_once_in_a_slice_of_its_time(
    rows: list[tuple[int, int, str]], period_ms: int
) -> None:
    said = [Said(t, t + more, text) for t, more, text in sorted(rows)]
    found = by_time(said, period_ms)
    assert [heard.number for heard in found] == list(range(len(found)))
    heard_words = [w for heard in found for part in heard.parts for w in pieces(part.text)]
    said_words = [w for one in said for w in pieces(one.text)]
    assert sorted(w.strip() for w in heard_words) == sorted(w.strip() for w in said_words)
    for heard in found:
        for part in heard.parts:
            ends = [one.t_end for one in said if one.t == part.key]
            assert (
                heard.number * period_ms <= max(ends) and part.key <= (heard.number + 1) * period_ms
            )
