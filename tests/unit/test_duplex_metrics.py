"""Figures of turn-taking, against values counted by hand and a count in another way."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from bmkit.data.slices.dialogue import TAGS, UNFINISHED, Tag
from bmkit.duplex.agents import Decided
from bmkit.duplex.metrics import (
    Conversation,
    Moment,
    conversation_metrics,
    decision_metrics,
    percentile,
    speed,
    turns,
)
from bmkit.duplex.wording import longest_common, shares_words, words


def decided(*rows: tuple[Tag, bool, bool]) -> list[Decided]:
    return [Decided(*row) for row in rows]


def talk(*rows: tuple[str | None, str | None, Tag | None], **more: object) -> Conversation:
    return Conversation("c", tuple(Moment(*row) for row in rows), **more)  # type: ignore[arg-type]


def figures(*found: Conversation, window: int = 3, slice_ms: int = 1000) -> dict[str, float | int]:
    return conversation_metrics(found, window=window, slice_ms=slice_ms)


def test_decisions_are_counted_as_by_hand() -> None:
    found = decision_metrics(
        decided(
            ("mid", False, False),
            ("mid", False, True),  # too early
            ("pause", False, False),
            ("end", True, True),
            ("end", True, False),  # missed
            ("backchannel", True, True),
        )
    )
    assert found["decisions"] == 6
    assert found["idle_precision"] == pytest.approx(2 / 3)
    assert found["idle_recall"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["accuracy_mid"] == 0.5
    assert found["count_mid"] == 2
    assert found["accuracy_pause"] == found["accuracy_backchannel"] == 1
    assert found["false_takeover_rate"] == pytest.approx(1 / 3)
    assert found["backchannel_resume"] == 1
    # each tag weighs 1: silence that is right is 1/2 of mid and all of pause, and 1/2 of end is not
    assert found["idle_precision_macro"] == pytest.approx(1.5 / 2)
    assert found["idle_recall_macro"] == pytest.approx(1.5 / 2)


def test_what_there_is_no_slice_for_has_no_figure() -> None:
    found = decision_metrics(decided(("end", True, True)))
    assert "false_takeover_rate" not in found
    assert "backchannel_resume" not in found
    assert found["idle_f1"] == 0  # nothing is silent, and nothing should be
    assert "takeover_rate" not in figures(talk((None, None, None)))


def test_decision_figures_are_those_of_fractions_over_all_pairs() -> None:
    draw = random.Random(3)
    for _ in range(40):
        rows = [
            (draw.choice(TAGS), draw.random() < 0.4, draw.random() < 0.4)
            for _ in range(draw.randint(1, 60))
        ]
        found = decision_metrics(decided(*rows))
        table = {pair: 0 for pair in itertools.product((False, True), repeat=2)}
        for _, wanted, speaks in rows:
            table[wanted, speaks] += 1
        idle = table[False, False] + table[True, False]
        right = table[False, False] + table[False, True]
        precision = Fraction(table[False, False], idle) if idle else Fraction(0)
        recall = Fraction(table[False, False], right) if right else Fraction(0)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else Fraction(0)
        assert found["idle_f1"] == pytest.approx(float(f1))
        early = [speaks for tag, _, speaks in rows if tag in UNFINISHED]
        if early:
            assert found["false_takeover_rate"] == pytest.approx(early.count(True) / len(early))


def test_an_answer_in_the_slice_that_ends_a_query_has_no_latency() -> None:
    found = figures(
        talk(
            ("what is", None, "mid"),
            ("a tapir", "A tapir is an", "end"),
            (None, " animal.", None),
            (None, None, None),
        )
    )
    assert found["response_latency_p50"] == found["response_latency_ms_p95"] == 0
    assert found["unanswered_rate"] == found["false_takeover_rate"] == 0
    assert found["takeover_rate"] == 1
    assert found["non_idle_rate"] == 0.5
    assert found["talk_share"] == 0.5
    # heard: slices 0 and 1 of the user, what the agent said of 1 and 2 in 2 and 3
    assert found["overlap_ratio"] == 0


def test_latencies_are_slices_behind_the_end_and_the_clock_s_milliseconds() -> None:
    late = [
        talk(
            ("hello", None, "end"),
            *((None, None, None) for _ in range(n - 1)),
            (None, " Hi." if n else None, None),
        )
        for n in (1, 2, 3)
    ]
    found = figures(*late, slice_ms=400)
    assert found["response_latency_p50"] == 2
    assert found["response_latency_ms_p50"] == 800
    assert found["response_latency_max"] == found["response_latency_p95"] == 3
    assert figures(*late, window=2)["unanswered_rate"] == pytest.approx(1 / 3)


def test_an_answer_behind_the_user_s_next_words_is_none() -> None:
    found = figures(
        talk(
            ("hello", None, "end"),
            (None, None, None),
            ("are you", None, "mid"),
            ("there", " Yes", "end"),
        )
    )
    assert found["turns"] == 2
    assert found["unanswered_rate"] == 0.5


def test_one_word_in_a_short_slice_takes_no_turn() -> None:
    short = talk(("hello", " Hi.", "end"), (None, None, None))
    assert figures(short, slice_ms=500)["takeover_rate"] == 0
    assert figures(short, slice_ms=500)["unanswered_rate"] == 0
    assert figures(short, slice_ms=1000)["takeover_rate"] == 1
    three = talk(("hello", " Hi to you.", "end"), (None, None, None))
    assert figures(three, slice_ms=500)["takeover_rate"] == 0
    assert figures(short, short, slice_ms=1001)["takeover_rate"] == 1
    four = talk(("hello", " Hi, how are you?", "end"), (None, None, None))
    assert figures(four, slice_ms=500)["takeover_rate"] == 1


def test_a_request_for_silence_is_kept_until_the_user_speaks_again() -> None:
    def asked(*agent: str | None) -> dict[str, float | int]:
        sides = [("tell me a story", "Once there", "end"), (None, " was a", None)]
        heard: list[tuple[str | None, Tag | None]] = [("stop it", "stop"), ("please", "stop")]
        heard += [(None, None), (None, None), (None, None)]
        agent += (None,)
        rows = [(user, said, tag) for (user, tag), said in zip(heard, agent, strict=True)]
        return figures(talk(*sides, *rows, ("thanks", "You are welcome.", "end")))  # type: ignore[arg-type]

    assert asked(None, None, None, None)["stop_latency_max"] == 0
    assert asked(None, None, None, None)["stopped_rate"] == 1
    assert asked(" fox", None, None, None)["stop_latency_max"] == 1
    assert asked(" fox", None, None, None)["interrupt_success"] == 1
    assert asked(" fox", " that", None, None)["stop_latency_ms_p95"] == 2000
    assert asked(" fox", " that", None, None)["stopped_rate"] == 0
    again = asked(None, None, None, " who was")
    assert again["stop_latency_max"] == 0
    assert again["stopped_rate"] == again["interrupt_success"] == 0


def test_an_interruption_succeeds_with_words_of_the_new_request() -> None:
    def asked(answer: str) -> dict[str, float | int]:
        return figures(
            talk(
                ("tell me of cats", "Cats are small", "end"),
                ("no rather", None, "barge"),
                ("of whales", answer, "end"),
                references=("Cats are small animals.", "The blue whale is the largest animal."),
            )
        )

    assert asked(" Whales live in the sea.")["interrupt_success"] == 1
    assert asked(" The largest one is blue.")["interrupt_success"] == 1
    assert asked(" Kittens drink milk.")["interrupt_success"] == 0
    assert asked(" Kittens drink milk.")["stopped_rate"] == 1


def test_a_query_that_begins_in_silence_interrupts_nothing() -> None:
    found = figures(
        talk(
            ("hello", "Hi.", "end"),
            (None, None, None),
            ("who", None, "mid"),
            ("are you", "I", "end"),
        )
    )
    assert found["interruptions"] == 0
    assert "stop_latency_p50" not in found
    assert "stopped_rate" not in found


def test_a_question_of_one_slice_leaves_no_slice_to_be_silent_in() -> None:
    found = figures(talk(("tell me", "It is", "end"), ("which", " The red", "side")))
    assert "stop_latency_p50" not in found
    assert found["interruptions"] == found["stopped_rate"] == 1


def test_the_agent_goes_on_when_it_hears_a_nod() -> None:
    def nod(before: str, *behind: str | None) -> dict[str, float | int]:
        first, second = behind
        sides = [("explain it", before, "end"), ("mm", first, "backchannel"), (None, second, None)]
        return figures(talk(*sides, (None, " late", None)))  # type: ignore[arg-type]

    assert nod("It is so", " that", " it")["backchannel_resume"] == 1
    assert nod("It is so", None, " that")["backchannel_resume"] == 1
    assert nod("It is so", None, None)["backchannel_resume"] == 0
    assert "backchannel_resume" not in nod("That is all.", None, None)
    assert nod("It is so", " that", " it")["overlap_ratio"] == 0.25


def test_what_is_said_behind_a_question_is_compared_with_what_is_written() -> None:
    found = figures(
        talk(
            ("how do i", "First you", "end"),
            ("which one", "The red one. Then", "side"),
            (None, " you pull", None),
            references=("First you take it.", "The red one. Then you push it."),
        )
    )
    # "the red one then you" of 6 and 7 words
    assert found["resume_coherence"] == pytest.approx(2 * 5 / (6 + 7))


def test_words_that_are_not_meant_for_the_agent_stay_unanswered() -> None:
    quiet = talk(("mum wait", None, "noise"), ("i come", None, "noise"), (None, None, None))
    soon = talk(("mum wait", None, "noise"), (None, None, None), (None, " Yes?", None))
    loud = talk(("mum wait", " Yes?", "noise"))
    assert figures(loud)["noise_takeover_rate"] == 1
    assert "false_takeover_rate" not in figures(loud)
    found = figures(quiet, soon)
    assert found["noise_takeover_rate"] == 0.5
    assert figures(soon, window=1)["noise_takeover_rate"] == 0
    within = talk(("what", None, "mid"), ("not now", None, "noise"), ("is it", "It is", "end"))
    assert "noise_takeover_rate" not in figures(within)
    assert figures(within)["false_takeover_rate"] == 0
    early = talk(("what", None, "mid"), ("not now", " Now", "noise"), ("is it", " it", "end"))
    assert figures(early)["false_takeover_rate"] == 0.5


def test_turns_go_over_pauses_and_foreign_words() -> None:
    rows: list[tuple[str | None, str | None, Tag | None]] = [
        ("what", None, "mid"),
        (None, None, "pause"),
        ("shut the door", None, "noise"),
        ("is it", "It", "end"),
        ("stop", None, "stop"),
        ("please", None, "stop"),
        (None, None, None),
        ("go on", " is", "end"),
        ("why", None, "side"),
    ]
    found = [(t.start, t.end, t.interrupts, t.tag) for t in turns(talk(*rows).moments)]
    assert found == [
        (0, 3, False, "end"),
        (4, 5, True, "stop"),
        (7, 7, False, "end"),
        (8, 8, True, "side"),
    ]


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed() -> None:
    draw = random.Random(1)
    for size in (1, 2, 7, 40):
        values = [draw.randint(0, 9) for _ in range(size)]
        for share in (1, 50, 95, 100):
            enough = [v for v in values if sum(w <= v for w in values) >= size * share / 100]
            assert percentile(values, share) == min(enough)


def test_speed_counts_the_slices_that_took_too_long() -> None:
    found = speed([0.1, 0.2, 0.3, 1.5], 1000)
    assert found["deadline_miss_rate"] == 0.25
    assert speed([1.0], 1000)["deadline_miss_rate"] == 0
    assert found["slice_ms_p50"] == 200
    assert found["slice_ms_max"] == 1500
    assert found["rtf_p95"] == 1.5
    assert speed([], 1000) == {}


def brute_subsequence(first: list[str], second: list[str]) -> int:
    for size in range(min(len(first), len(second)), 0, -1):
        wanted = set(itertools.combinations(second, size))
        if wanted & set(itertools.combinations(first, size)):
            return size
    return 0


def test_the_longest_common_subsequence_is_that_of_all_subsequences() -> None:
    draw = random.Random(5)
    for _ in range(60):
        first = [draw.choice("abcd") for _ in range(draw.randint(0, 7))]
        second = [draw.choice("abcd") for _ in range(draw.randint(0, 7))]
        common = brute_subsequence(first, second)
        expected = 2 * common / (len(first) + len(second)) if common else 0
        assert longest_common(" ".join(first), " ".join(second)) == pytest.approx(expected)


def test_texts_share_words_that_say_something() -> None:
    assert shares_words("Tell me about whales.", "A whale sings")
    assert not shares_words("what do you want with that", "do that with what you want")
    assert shares_words("It was 1998", "in 1998")
    assert words("L'été, it's 4!") == ["l", "été", "it", "s", "4"]
