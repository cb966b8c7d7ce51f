"""Scripted agents against the scripted user, and the rules that are compared with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bmkit import builtin
from bmkit.data.slices import dialogue as dialogues
from bmkit.data.slices.dialogue import TAGS, Dialogue, Slice, Tag
from bmkit.duplex.agents import Decided, Session, Spoken
from bmkit.duplex.baselines import AlwaysIdle, Punctuation, VoiceActivity, baselines
from bmkit.duplex.metrics import Conversation
from bmkit.duplex.suites import (
    Found,
    answer_length,
    measure,
    of_condition,
    sweep,
    without_punctuation,
)
from bmkit.duplex.user import MOST_TALK, replayed, script, simulated

WRITTEN = builtin.directory() / "data/duplex-eval.jsonl"


def written() -> list[Dialogue]:
    return list(dialogues.read(WRITTEN))


@dataclass(frozen=True)
class Scripted:
    """An agent whose sessions are made by a function, and who decides by another."""

    make: Callable[[], Session]
    right: Callable[[Slice], bool] = lambda one: one.agent is not None
    name: str = "scripted"
    wordless: bool = False

    def open(self) -> Session:
        return self.make()

    def judge(self, dialogue: Dialogue) -> list[Decided]:
        return [
            Decided(s.tag, s.agent is not None, self.right(s), 0.1 if self.right(s) else 0.9)
            for s in dialogue.slices
        ]


class Reading:
    """Says what is written, whatever it hears: it is replayed what it was written for."""

    def __init__(self, lines: Iterable[str | None]) -> None:
        self.lines = iter(lines)
        self.heard: list[str | None] = []

    def step(self, user: str | None) -> Spoken:
        self.heard.append(user)
        return Spoken(next(self.lines, None), 0.5, 0.01)


class Chattering:
    """Never stops."""

    def step(self, user: str | None) -> Spoken:
        return Spoken(" and then there was more", 0.0)


def run(suite: str, agent: Scripted, rows: Sequence[Dialogue]) -> Found:
    return measure(suite, agent, rows, window=3, slice_ms=1000)


def together(found: Sequence[Found]) -> dict[str, float]:
    from bmkit.duplex.metrics import conversation_metrics

    conversations = [c for one in found for c in one.conversations]
    return conversation_metrics(conversations, window=3, slice_ms=1000)


def oracle(suite: str, rows: Sequence[Dialogue]) -> dict[str, float]:
    """Figures of an agent that knows what is written."""
    found = []
    for row in rows:
        lines = [one.agent for one in row.slices]
        found.append(run(suite, Scripted(lambda lines=lines: Reading(lines)), [row]))  # type: ignore[misc]
    return together(found)


def test_an_agent_that_knows_what_is_written_has_perfect_figures() -> None:
    rows = written()
    decided = run("decision", Scripted(Chattering), rows).metrics
    assert decided["idle_f1"] == decided["idle_f1_macro"] == decided["accuracy"] == 1
    assert decided["false_takeover_rate"] == 0
    replayed = oracle("replay", rows)
    for name in ("takeover_rate", "stopped_rate", "interrupt_success", "resume_coherence"):
        assert replayed[name] == 1, name
    for name in ("false_takeover_rate", "noise_takeover_rate", "unanswered_rate"):
        assert replayed[name] == 0, name
    assert replayed["backchannel_resume"] == 1
    assert replayed["response_latency_max"] == replayed["stop_latency_max"] == 0
    assert replayed["turns"] == sum(s.tag in ("end", "side") for row in rows for s in row.slices)
    assert replayed["repeats"] == 0


def test_an_agent_that_never_stops_has_terrible_figures() -> None:
    rows = written()
    agent = Scripted(Chattering, right=lambda _: True)
    decided = run("decision", agent, rows).metrics
    assert decided["idle_f1"] == decided["accuracy_pause"] == decided["accuracy_stop"] == 0
    assert decided["false_takeover_rate"] == 1
    for suite in ("replay", "simulate"):
        found = run(suite, agent, rows).metrics
        assert found["false_takeover_rate"] == found["non_idle_rate"] == 1
        assert found["stopped_rate"] < 0.6  # a question of one slice leaves no slice to be silent
        assert found["stop_latency_p95"] > 1


def test_an_agent_that_never_speaks_answers_nothing_and_is_asked_twice() -> None:
    rows = written()
    silent = run("simulate", Scripted(lambda: AlwaysIdle().open()), rows).metrics
    asked = sum(act.kind == "turn" for row in rows for act in script(row))
    assert silent["unanswered_rate"] == 1
    assert silent["repeats"] == asked
    assert silent["turns"] == 2 * asked
    assert silent["false_takeover_rate"] == silent["non_idle_rate"] == 0


def converse(text: Sequence[tuple[str | None, str | None, Tag]], session: Session) -> Conversation:
    slices = tuple(Slice(*row) for row in text)
    return simulated(session, Dialogue("d", "basic", slices), 2)


STOPPED: list[tuple[str | None, str | None, Tag]] = [
    ("tell me", None, "mid"),
    ("of cats", "Cats are", "end"),
    (None, " small and", "cont"),
    ("please", None, "stop"),
    ("stop", None, "stop"),
    (None, None, "quiet"),
]


def test_the_user_interrupts_once_so_much_is_said() -> None:
    session = Reading([None, None, None, " Cats", " are", " not", None, None, None])
    found = converse(STOPPED, session)
    assert session.heard[:7] == ["tell me", "of cats", None, None, None, "please", "stop"]
    assert found.references == ("Cats are small and",)
    assert found.repeats == 0


def test_the_user_does_not_stop_an_agent_that_is_silent() -> None:
    session = Reading([None, " Cats.", None, None, None])
    converse(STOPPED, session)
    assert "stop" not in session.heard


def test_the_user_asks_again_once_and_goes_on() -> None:
    session = Reading([])
    found = converse([*STOPPED, ("and dogs", "Dogs", "end")], session)
    asked = ["tell me", "of cats", None, None]
    assert session.heard[:10] == [*asked, *asked, "and dogs", None]
    assert found.repeats == 2
    assert found.references == ("Cats are small and",) * 2 + ("Dogs",) * 2


def test_a_question_in_between_is_an_ordinary_one_if_the_agent_is_done() -> None:
    rows: list[tuple[str | None, str | None, Tag]] = [
        ("tell me", "Cats are", "end"),
        (None, " small and", "cont"),
        ("which", None, "barge"),
        ("ones", "All of them", "side"),
    ]
    found = converse(rows, Reading([" Cats.", None, None, None, " All.", None]))
    assert [m.tag for m in found.moments if m.user is not None] == ["end", "mid", "end"]
    found = converse(rows, Reading([" Cats", " are", None, None, " All.", None]))
    assert [m.tag for m in found.moments if m.user is not None] == ["end", "barge", "side"]


def test_the_user_nods_while_the_agent_speaks() -> None:
    rows: list[tuple[str | None, str | None, Tag]] = [
        ("tell me", "Cats are", "end"),
        (None, " small and", "cont"),
        ("i see", " soft.", "backchannel"),
        (None, None, "quiet"),
    ]
    session = Reading([" Cats", " are", " small", " and", " soft", None])
    converse(rows, session)
    assert session.heard[:4] == ["tell me", None, "i see", None]
    session = Reading([" Cats.", None])
    converse(rows, session)
    assert "i see" not in session.heard


def test_the_user_waits_for_the_end_of_an_answer_but_not_for_ever() -> None:
    rows: list[tuple[str | None, str | None, Tag]] = [
        ("tell me", "Cats", "end"),
        (None, None, "quiet"),
        (None, None, "quiet"),
        ("and dogs", "Dogs", "end"),
    ]
    session = Reading([" a", " b", " c", None, None, " d", None, None])
    converse(rows, session)
    assert session.heard[:6] == ["tell me", None, None, None, None, "and dogs"]
    heard = [m.user for m in converse(rows, Chattering()).moments]
    assert heard.index("and dogs") == 1 + MOST_TALK


def test_silence_follows_what_is_replayed_so_that_its_end_can_be_answered() -> None:
    row = Dialogue(
        "d",
        "basic",
        (Slice("mum", None, "noise"), Slice(None, None, "pause"), Slice("hello", "Hi.", "end")),
    )
    found = replayed(Reading([None, None, None, None, None, " Hi."]), row, 3)
    assert [m.tag for m in found.moments] == ["noise", "pause", "end", None, None, None]
    assert found.moments[-1].agent == " Hi."
    assert found.references == ("Hi.",)


def test_a_slice_of_silence_is_in_front_of_a_query_at_least() -> None:
    rows: list[tuple[str | None, str | None, Tag]] = [
        ("shut the door", None, "noise"),
        ("tell me", "Cats", "end"),
    ]
    session = Reading([])
    converse(rows, session)
    assert session.heard[:3] == ["shut the door", None, "tell me"]


def test_what_is_not_meant_for_the_agent_stays_within_the_query_it_is_in() -> None:
    rows = Dialogue(
        "d",
        "noise",
        (
            Slice("what", None, "mid"),
            Slice("shut the door", None, "noise"),
            Slice("is it", "It", "end"),
            Slice(None, None, "quiet"),
            Slice("come here", None, "noise"),
            Slice("at once", None, "noise"),
        ),
    )
    first, second = script(rows)
    assert [user for user, _ in second.slices] == ["come here", "at once"]
    assert [tag for _, tag in first.slices] == ["mid", "noise", "end"]
    assert (second.kind, second.interrupts, second.silent) == ("aside", False, 1)


def test_rules_decide_as_they_are_described() -> None:
    rows = Dialogue(
        "d",
        "basic",
        (
            Slice("What is", None, "mid"),
            Slice("it?", "It is", "end"),
            Slice(None, " this.", "cont"),
            Slice("Sure.", " And that.", "backchannel"),
            Slice(None, None, "quiet"),
            Slice("And", None, "mid"),
            Slice(None, None, "pause"),
            Slice(None, None, "pause"),
            Slice("so", "So.", "end"),
            Slice("Stop!", None, "stop"),
            Slice(None, None, "quiet"),
        ),
    )
    speaks = {
        rule.name: [d.speaks for d in rule.judge(rows)]
        for rule in (Punctuation(), VoiceActivity(1), VoiceActivity(2), AlwaysIdle())
    }
    at = {name: [n for n, said in enumerate(own) if said] for name, own in speaks.items()}
    assert at == {
        "punctuation": [1, 2, 3, 9],
        "vad_1": [2, 6, 10],
        "vad_2": [2, 7],
        "always_idle": [],
    }


@pytest.mark.parametrize("slices", [1, 2])
def test_a_rule_answers_after_so_many_slices_and_for_so_many(slices: int) -> None:
    session = VoiceActivity(slices, 2).open()
    said = [session.step(user).speaks for user in ("so", None, None, None, None, None)]
    assert said == [slices <= at < slices + 2 for at in range(6)]


def test_rules_fall_silent_at_any_word() -> None:
    session = Punctuation(5).open()
    assert session.step("Go.").speaks
    assert session.step(None).speaks
    assert not session.step("wait").speaks
    assert not session.step(None).speaks


def test_nothing_of_one_conversation_is_in_the_next() -> None:
    for agent in baselines(3):
        agent.open().step("Go.")
        assert not agent.open().step(None).speaks


def test_words_of_a_recogniser_have_neither_case_nor_marks() -> None:
    row = Dialogue("d", "basic", (Slice("Well…", "Yes.", "end"), Slice(None, None, "quiet")))
    heard = without_punctuation(row).slices
    assert [s.user for s in heard] == ["well", None]
    assert heard[0].agent == "Yes."


def test_thresholds_are_tried_on_how_likely_silence_was() -> None:
    decided = [
        Decided("mid", False, False, 0.96),
        Decided("end", True, False, 0.7),
        Decided("quiet", False, False, 0.99),
    ]
    table = {row["tau"]: row for row in sweep(decided, (0.5, 0.9, 0.97))}
    assert table[0.5]["answered_at_once"] == 0
    assert table[0.9] == pytest.approx(
        {
            "tau": 0.9,
            "idle_f1": 1,
            "false_takeover_rate": 0,
            "answered_at_once": 1,
            "spoke_when_done": 0,
        }
    )
    assert table[0.97]["false_takeover_rate"] == 1
    assert (
        sweep(decided, (0.7,))[0]["answered_at_once"] == 0
    )  # silence is as likely as it has to be
    assert sweep([replace(one, p_idle=None) for one in decided]) == []


def test_the_length_of_an_answer_is_the_mean_of_all() -> None:
    rows = [
        Dialogue(
            "d",
            "basic",
            tuple(Slice(None, "x" if tag != "quiet" else None, tag) for tag in tags),
        )
        for tags in (("end", "cont", "side", "quiet"), ("end", "cont"))
    ]
    assert answer_length(rows) == 2  # 2, 1, 2: the mean is 1.67
    assert answer_length([]) == 1


def test_the_dialogues_that_ship_are_many_and_balanced() -> None:
    rows = written()
    assert len(rows) == len({row.id for row in rows}) >= 120
    counts = dict.fromkeys(TAGS, 0)
    for row in rows:
        for one in row.slices:
            counts[one.tag] += 1
            assert one.user is None or len(one.user.split()) <= 4
    for tag in ("mid", "end", "pause", "stop", "barge", "noise", "quiet", "cont"):
        assert counts[tag] >= 40, tag
    assert min(counts["side"], counts["backchannel"]) >= 20
    said = [" ".join(s.user for s in row.slices if s.user) for row in rows]
    assert len(set(said)) == len(rows)


def test_no_query_of_them_is_in_what_bmkit_trains_on() -> None:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"[a-z0-9']+", text.lower()))

    seen: set[str] = set()
    for file in sorted(WRITTEN.parent.glob("*.jsonl")):
        if file.name not in (WRITTEN.name, "duplex-questions.jsonl"):
            for line in file.read_text().splitlines():
                for message in json.loads(line).get("messages", []):
                    seen.add(plain(message["content"]))
    assert len(seen) > 1000
    asked = {
        plain(" ".join(user for user, _ in act.slices if user))
        for row in written()
        for act in script(row)
        if act.kind == "turn"
    }
    same = {text for text in asked & seen if len(text.split()) > 3}
    assert not same


def test_the_dialogues_that_ship_are_what_their_source_says() -> None:
    import subprocess
    import sys

    script_file = Path(__file__).parents[2] / "scripts/duplex_eval.py"
    done = subprocess.run([sys.executable, str(script_file), "--check"], check=False)
    assert done.returncode == 0


def test_the_rule_that_reads_marks_is_deaf_without_them() -> None:
    rows = written()
    rule = Punctuation(3)
    heard = measure("replay", rule, of_condition(rows, "unpunctuated"), window=3, slice_ms=1000)
    assert heard.metrics["unanswered_rate"] == 1
    marked = measure("replay", rule, of_condition(rows, "punctuated"), window=3, slice_ms=1000)
    assert marked.metrics["interruptions"] > 0
    assert "interrupt_success" not in marked.metrics
    assert marked.metrics["unanswered_rate"] == 0
