"""Slices as tokens and back, silence that collapses, answers that are divided anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmkit.data.slices import dialogue, stored, transcript
from bmkit.data.slices.dialogue import Dialogue, Slice
from bmkit.data.slices.layout import Layout, Pair, collapsed, parsed, refilled, rendered
from bmkit.errors import InputError

IDLE = Layout(user=(1,), agent=(2,), idle=3, end=4)
STATE = Layout(
    (1,),
    (2,),
    3,
    4,
    tuple(
        (name, 5 + i)
        for i, name in enumerate(("listen", "think", "quiet", "yield", "answer", "continue"))
    ),
)
PUBLISHED = Layout(user=(1, 11, 12), agent=(1, 13, 12), idle=3, end=4, opening=(0,))
TALK = [
    Pair((20, 21), None, "mid"),
    Pair((22,), (30, 31, 32), "end"),
    Pair(None, (33,), "cont"),
    Pair(None, None, "quiet"),
]


def test_a_pair_is_user_agent_and_end() -> None:
    found = rendered(IDLE, TALK, decision=2.0)
    assert found.ids == [1, 20, 21, 2, 3, 4, 1, 22, 2, 30, 31, 32, 4, 1, 3, 2, 33, 4, 1, 3, 2, 3, 4]
    assert found.learned[:6] == [0, 0, 0, 0, 2.0, 1.0]
    assert [(d.position, d.speaks) for d in found.decisions] == [
        (4, False),
        (9, True),
        (16, True),
        (21, False),
    ]
    assert found.starts == [0, 6, 13, 18]


@pytest.mark.parametrize("layout", [IDLE, STATE, PUBLISHED])
def test_slices_come_back_from_their_tokens(layout: Layout) -> None:
    ids = rendered(layout, TALK).ids
    assert [(p.user, p.agent) for p in parsed(layout, ids)] == [(p.user, p.agent) for p in TALK]


def test_with_states_the_first_token_says_why() -> None:
    found = rendered(STATE, TALK)
    assert [found.ids[d.position] for d in found.decisions] == [5, 9, 10, 7]


def test_an_end_without_an_answer_is_silence_in_every_state() -> None:
    missed = rendered(STATE, [Pair((20,), None, "end", 0.0), Pair(None, (30,), "late")])
    assert [missed.ids[d.position] for d in missed.decisions] == [7, 9]
    assert [p.agent for p in parsed(STATE, missed.ids)] == [None, (30,)]


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_session_that_is_cut_off_is_refused(cut: int) -> None:
    ids = rendered(IDLE, TALK).ids
    with pytest.raises(ValueError, match=r"slice"):
        parsed(IDLE, ids[:-cut])


def test_silence_takes_one_pair_however_long_it_is() -> None:
    silent = Pair(None, None, "quiet")
    heard = Pair((20,), None, "mid")
    assert list(collapsed([silent] * 5)) == [silent]
    assert list(collapsed([silent, silent, heard, silent])) == [silent, heard, silent]
    late = Pair(None, (30,), "late")
    assert list(collapsed([heard, silent, silent, late])) == [heard, late]
    assert list(collapsed([])) == []


def test_an_answer_is_divided_into_slices_of_so_many_tokens() -> None:
    pairs = [Pair((20,), (1, 2, 3), "end"), Pair(None, (4, 5, 6, 7), "cont"), TALK[3]]
    found = refilled(pairs, 2)
    assert [p.agent for p in found] == [(1, 2), (3, 4), (5, 6), (7,), None]
    assert [p.user for p in found] == [(20,), None, None, None, None]


def test_an_interrupted_answer_ends_where_it_was_interrupted() -> None:
    pairs = [Pair((20,), (1, 2, 3), "end"), Pair(None, (4, 5), "cont"), Pair((21,), None, "barge")]
    assert [p.agent for p in refilled(pairs, 2)] == [(1, 2), (3, 4), None]


def test_an_answer_that_needs_fewer_slices_leaves_the_user_s_words() -> None:
    pairs = [
        Pair((20,), (1,), "end"),
        Pair((21,), (2,), "backchannel"),
        Pair(None, (3,), "cont"),
        Pair((22,), (4, 5), "side"),
    ]
    found = refilled(pairs, 4)
    assert [(p.user, p.agent, p.weight) for p in found] == [
        ((20,), (1, 2, 3), 1.0),
        ((21,), None, 0.0),
        ((22,), (4, 5), 1.0),
    ]


def test_a_dialogue_is_the_same_after_json(tmp_path: Path) -> None:
    told = Dialogue("a", "pause", (Slice("hi", None, "mid"), Slice(None, " Yes", "late", 0.5)))
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(told.values()) + "\n", encoding="utf-8")
    assert list(dialogue.read(file)) == [told]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "no `slices`"),
        ({"slices": [{"u": "", "a": None, "tag": "mid"}]}, "slice 0: `u`"),
        ({"slices": [{"u": "x", "a": None, "tag": "midd"}]}, "did you mean `mid`"),
        ({"slices": [{"u": "x", "a": None, "tag": "mid", "w": True}]}, "`w`"),
    ],
)
def test_a_bad_dialogue_is_named_with_its_line(
    tmp_path: Path, row: dict[str, object], problem: str
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=problem) as caught:
        list(dialogue.read(file))
    assert ":2:" in str(caught.value)


HEAD = {"v": 1, "type": "session", "id": "s", "scheme": "idle", "slice_ms": 1000}


def written(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_transcript_is_the_same_after_it_is_written(tmp_path: Path) -> None:
    file = written(
        tmp_path / "s.jsonl",
        HEAD,
        {"type": "user", "t": 0, "t_end": 900, "text": "hi", "final": True},
        {"type": "label", "t": 900, "kind": "turn_end"},
        {"type": "agent", "t": 1000, "text": " Hello"},
        {"type": "user", "t": 1000, "text": "hey", "rev": 1},
    )
    found = transcript.read(file)
    assert [s.text for s in found.said] == ["hi", "hey"] and found.said[1].rev == 1
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(found.lines()) + "\n", encoding="utf-8")
    assert transcript.read(again) == found


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"type": "user", "t": 5, "t_end": 4, "text": "x"}, "before `t`"),
        ({"type": "user", "t": -1, "text": "x"}, "milliseconds"),
        ({"type": "usr", "t": 5, "text": "x"}, "did you mean `user`"),
        ({"type": "session"}, "no other"),
        ({"type": "user", "t": 5}, "`text`"),
    ],
)
def test_a_bad_line_of_a_transcript_is_named(
    tmp_path: Path, row: dict[str, object], problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        transcript.read(written(tmp_path / "s.jsonl", HEAD, row))
    assert ":2:" in str(caught.value)


def test_a_transcript_that_goes_back_in_time_is_refused(tmp_path: Path) -> None:
    late = {"type": "user", "t": 900, "text": "a"}
    with pytest.raises(InputError, match="sort by time"):
        transcript.read(written(tmp_path / "s.jsonl", HEAD, late, {**late, "t": 100}))


def test_what_makes_a_model_duplex_is_kept_beside_it(tmp_path: Path) -> None:
    told = stored.Stored("state", STATE, 800, 8, collapse_idle=False, threshold=0.9)
    assert stored.read(tmp_path) is None
    stored.write(tmp_path, told)
    assert stored.read(tmp_path) == told
    whole = (tmp_path / stored.FILE).read_text()
    for text, said in (
        ('{"version": 1}', "it has no `tokens`"),
        ("[]", "it is not an object"),
        (whole.replace("0.9", "7"), "`threshold` is 7, and no probability"),
        ("{", "damaged"),
    ):
        (tmp_path / stored.FILE).write_text(text)
        with pytest.raises(InputError, match=said):
            stored.read(tmp_path)
