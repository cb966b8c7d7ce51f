"""Streaming: pieces make up the whole text, characters stay whole, stop strings never show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmkit.runtime import stream
from bmkit.runtime.generate import StopStrings
from bmkit.runtime.stream import TextStream

ALPHABET = st.sampled_from("abc \n\xe9\u20ac\U0001f600\ufffd")
TEXTS = st.text(ALPHABET, max_size=30)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


def until_stop(text: str, stops: list[str]) -> str:
    """Return `text` up to the first place where a stop string stands."""
    for place in range(len(text)):
        if any(text.startswith(stop, place) for stop in stops):
            return text[:place]
    return text


def run(tokenizer: Any, ids: list[int], stops: list[str], sizes: int = 1) -> list[str]:
    """Stream `ids`, and return what was written after each put and at the end."""
    pieces: list[str] = []
    written: list[str] = []
    streamer = TextStream(tokenizer, stops, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for start in range(0, len(ids), sizes):
        streamer.put(torch.tensor(ids[start : start + sizes]))
        written.append("".join(pieces))
    streamer.end()
    return [*written, "".join(pieces)]


def bytes_of(text: str, tokenizer: Any) -> list[int]:
    """Return one token for each byte of `text`."""
    from tokenizers.pre_tokenizers import ByteLevel

    split = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    letters = "".join(part for part, _ in split)
    return [tokenizer.convert_tokens_to_ids(letter) for letter in letters]


@given(TEXTS, STOPS, st.integers(1, 4))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_pieces_make_up_the_text_until_the_stop(
    tokenizer: Any, text: str, stops: list[str], sizes: int
) -> None:
    written = run(tokenizer, bytes_of(text, tokenizer), stops, sizes)
    wanted = until_stop(text, stops)
    assert written[-1] == wanted
    for early in written:
        assert wanted.startswith(early), "something was shown that had to be taken back"


@given(TEXTS)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_character_of_several_bytes_is_never_shown_in_part(tokenizer: Any, text: str) -> None:
    ids = bytes_of(text, tokenizer)
    assert len(ids) == len(text.encode())
    for count, written in enumerate(run(tokenizer, ids, [])[:-1], 1):
        whole = text.encode()[:count].decode(errors="ignore")
        assert whole.startswith(written)


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer: Any) -> None:
    text = "It is \u20ac4."
    written = run(tokenizer, bytes_of(text, tokenizer), [])
    whole = [text.encode()[:n].decode(errors="ignore") for n in range(1, len(text.encode()) + 1)]
    assert written[:-1] == whole


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_sure(tokenizer: Any) -> None:
    assert run(tokenizer, bytes_of("a STOP b", tokenizer), ["STOP"]) == [
        *("a", "a ", "a ", "a ", "a ", "a ", "a ", "a ", "a ")
    ]
    assert run(tokenizer, bytes_of("a STOR", tokenizer), ["STOP"]) == [
        *("a", "a ", "a ", "a ", "a ", "a STOR", "a STOR")
    ]


def test_what_was_held_back_is_shown_at_the_end(tokenizer: Any) -> None:
    assert run(tokenizer, bytes_of("a ST", tokenizer), ["STOP"])[-2:] == ["a ", "a ST"]


def test_the_first_of_several_stop_strings_ends_the_text(tokenizer: Any) -> None:
    assert run(tokenizer, bytes_of("one two three", tokenizer), ["three", "two"])[-1] == "one "


def test_special_tokens_and_the_prompt_are_not_shown(tokenizer: Any) -> None:
    ids = [*bytes_of("Hi", tokenizer), tokenizer.eos_token_id]
    assert run(tokenizer, ids, [])[-1] == "Hi"


def test_nothing_is_written_when_there_is_nothing_to_say(tokenizer: Any) -> None:
    pieces: list[str] = []
    streamer = TextStream(tokenizer, [], pieces.append)
    streamer.put(torch.tensor([[1, 2]]))
    streamer.put(torch.tensor([tokenizer.eos_token_id]))
    streamer.end()
    assert pieces == []


@given(TEXTS, STOPS)
@settings(max_examples=200, deadline=None)
def test_cutting_takes_the_earliest_stop(text: str, stops: list[str]) -> None:
    assert stream.cut_at(text, stops) == until_stop(text, stops)


@pytest.mark.parametrize(
    ("text", "stops", "count"),
    [
        ("abc", [], 0),
        ("abc", ["xyz"], 0),
        ("abx", ["xyz"], 1),
        ("axy", ["xyz"], 2),
        ("aXX", ["XXY"], 2),
        ("axy", ["xyz", "yw"], 2),
        ("axyz", ["xyz"], 0),
        ("\n\n", ["\n\n\n"], 2),
    ],
)
def test_held_back_is_the_longest_beginning_of_a_stop_string(
    text: str, stops: list[str], count: int
) -> None:
    assert stream.held_back(text, stops) == count


# --- what an answer shows ------------------------------------------------------------------------


def test_a_stop_string_may_name_a_special_token(tokenizer: Any) -> None:
    special = tokenizer.eos_token
    ids = [*bytes_of("Hi you", tokenizer), tokenizer.eos_token_id, *bytes_of("more", tokenizer)]
    assert stream.visible(ids, tokenizer, [special]) == ("Hi you", 7)
    assert stream.visible(ids, tokenizer, [f"you{special}"]) == ("Hi ", 7)
    assert stream.visible(ids, tokenizer, ["more"]) == ("Hi you", len(ids))
    assert stream.visible(ids, tokenizer, ["nothing"]) == ("Hi youmore", None)
    assert run(tokenizer, ids, [special])[-1] == "Hi you"


def test_a_stop_string_in_the_prompt_does_not_end_the_answer(tokenizer: Any) -> None:
    prompt = bytes_of("one\n\n", tokenizer)
    stop = StopStrings(tokenizer, ["\n\n"], len(prompt))
    for text, done in (("", False), ("two\n", False), ("two\n\n", True)):
        ids = torch.tensor([prompt + bytes_of(text, tokenizer)])
        assert stop(ids, torch.zeros(1)).tolist() == [done]


# What is decoded of half a character is U+FFFD, so that one can't be a stop string here.
@given(st.text(ALPHABET, max_size=40), STOPS.filter(lambda s: s and "\ufffd" not in "".join(s)))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_row_ends_with_the_token_that_completes_a_stop_string(
    tokenizer: Any, text: str, stops: list[str]
) -> None:
    ids = bytes_of(text, tokenizer)
    stop = StopStrings(tokenizer, stops, 0)
    ends = [n for n in range(1, len(ids) + 1) if stop(torch.tensor([ids[:n]]), torch.zeros(1))[0]]
    count = stream.visible(ids, tokenizer, stops)[1]
    assert (ends[0] if ends else None) == count
