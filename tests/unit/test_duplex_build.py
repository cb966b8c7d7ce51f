"""Dialogues out of chats: what each interaction shows, what is held out, what is counted."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bmkit import builtin
from bmkit.data.slices import ultrachat
from bmkit.data.slices.dialogue import Dialogue, Slice
from bmkit.duplex import chats, transitions
from bmkit.duplex.build import Builder, split_of
from bmkit.duplex.chats import Chat, Turn
from bmkit.duplex.english import OPEN
from bmkit.duplex.interactions import INTERACTIONS
from bmkit.duplex.kinds import MIX
from bmkit.duplex.recipe import DuplexRecipe, HeldOut
from bmkit.duplex.scene import Scene, UnfitError
from bmkit.duplex.sketch import Sketch
from bmkit.duplex.speech import Voice, unpunctuated
from bmkit.errors import InputError
from bmkit.pipeline.stage import Request, load_recipe

DATA = builtin.directory() / "data"
LISTS = DATA / "duplex-transitions.json"
STARTER = load_recipe(Request("duplex", "starter"))[1]
SHIPPED = [Path(source["path"]) for source in STARTER.model_dump()["sources"]]
STARTS = ("end", "side", "late")
TURNS = (
    Turn("How do bees find their way?", "They look at the sun. They know landmarks, too. " * 2),
    Turn(
        "Is that true on rainy days and at night as well?", "They stay at home then, dry and warm."
    ),
    Turn("I see. What do they eat in the winter?", "Honey, which they have made in summer. " * 2),
)


def all_chats() -> list[Chat]:
    found = [one for path in SHIPPED for one in chats.read(path, "auto")]
    return [one for one in found if isinstance(one, Chat)]


def scene(kind: str, seed: int, chat: Chat, *, spoken: bool = False) -> Scene:
    """Let an interaction happen in a chat."""
    draw = random.Random(seed)
    voice = Voice(not spoken, 0.5 if spoken else 0.0, draw)
    lists = transitions.read(LISTS, 0.0)["train"]
    made = Scene(chat, OTHERS, lists, voice, draw, (2, 4), 10)
    INTERACTIONS[kind](made)
    return made


OTHERS = all_chats()[:20]
CHAT = Chat("bees", TURNS)


def heard(slices: list[Slice]) -> str:
    return " ".join(one.user for one in slices if one.user is not None)


def told(slices: list[Slice]) -> str:
    return "".join(one.agent for one in slices if one.agent is not None)


def in_order(words: list[str], among: list[str]) -> bool:
    left = iter(among)
    return all(word in left for word in words)


@pytest.mark.parametrize("kind", MIX)
@pytest.mark.parametrize("spoken", [False, True])
def test_an_answer_begins_where_a_query_ends_and_nowhere_else(kind: str, spoken: bool) -> None:
    speaks = (*STARTS, "cont", "backchannel")
    for seed, chat in enumerate((CHAT, *OTHERS)):
        try:
            slices = scene(kind, seed, chat, spoken=spoken).slices
        except UnfitError:
            continue
        before: str | None = None
        for one in slices:
            assert (one.agent is not None) == (one.tag in speaks), one
            if one.agent is not None and before is None:
                assert one.tag in STARTS
            if one.tag in ("mid", "end", "barge", "stop", "side", "noise", "backchannel"):
                assert one.user is not None
            if one.tag in ("pause", "late", "cont"):
                assert one.user is None
            before = one.agent


@pytest.mark.parametrize("kind", ["basic", "pause", "late_answer", "backchannel", "noise"])
def test_nothing_that_is_said_is_lost(kind: str) -> None:
    for seed in range(40):
        slices = scene(kind, seed, CHAT).slices
        words = " ".join(turn.user for turn in TURNS).split()
        assert in_order(words, heard(slices).split())
        assert told(slices) == "".join(turn.agent for turn in TURNS)
        starts = [number for number, one in enumerate(slices) if one.tag in STARTS]
        assert len(starts) == len(TURNS)
        for turn, start in zip(TURNS, starts, strict=True):
            asked = heard(slices[: start + 1]).split()
            assert in_order(turn.user.split(), asked), "it is answered before it is asked"


def test_others_are_heard_between_turns_within_queries_and_during_answers() -> None:
    found: Counter[str] = Counter()
    rounds = []
    for seed in range(60):
        slices = scene("noise", seed, CHAT).slices
        before = [None, *(one.tag for one in slices)]
        behind = [*(one.tag for one in slices[1:]), None]
        starts = 0
        for one, last, after in zip(slices, before, behind, strict=False):
            if one.tag == "noise" and last != "noise":
                starts += 1
                found["within" if last == "mid" else "between"] += 1
            elif one.tag == "backchannel" and last != "backchannel":
                starts += 1
                found["during"] += 1
            assert one.tag != "noise" or after in ("noise", "mid", "end", "quiet"), slices
        rounds.append(starts)
    assert min(rounds) == 1 and max(rounds) == len(TURNS)
    assert all(found[place] > 8 for place in ("between", "within", "during")), found


def test_a_basic_dialogue_is_its_chat_and_silence() -> None:
    made = scene("basic", 1, CHAT)
    assert heard(made.slices) == " ".join(turn.user for turn in TURNS)
    assert {one.tag for one in made.slices} <= {"mid", "end", "cont", "quiet"}


def test_an_agent_that_is_told_to_stop_has_more_to_say_and_does_not_say_it() -> None:
    for seed in range(40):
        slices = scene("termination", seed, CHAT).slices
        at = next(number for number, one in enumerate(slices) if one.tag == "stop")
        assert slices[at + 1].silent
        first = at
        while slices[first - 1].tag == "barge":
            first -= 1
        if told(slices) != "".join(turn.agent for turn in TURNS):
            assert slices[first - 1].agent is not None
            done = told(slices[:first])
            assert not any(done.endswith(turn.agent) for turn in TURNS), (
                "it was interrupted when it had finished"
            )


def test_a_cut_sentence_begins_anew_behind_a_question_in_between() -> None:
    for seed in range(40):
        made = scene("back_on_topic", seed, CHAT)
        side = next(number for number, one in enumerate(made.slices) if one.tag == "side")
        cut = next(
            turn.agent
            for turn in TURNS
            if not told(made.slices[:side]).endswith(turn.agent)
            and told(made.slices[:side])[-8:] in turn.agent
        )
        behind = told(made.slices[side:])
        assert cut.strip().rsplit(". ", 1)[-1] in behind


def test_the_agent_goes_on_behind_a_backchannel() -> None:
    for seed in range(40):
        slices = scene("backchannel", seed, CHAT).slices
        at = [number for number, one in enumerate(slices) if one.tag == "backchannel"]
        assert at
        assert all(slices[number - 1].agent is not None for number in at)


def test_a_missed_end_is_not_learned_and_its_answer_is() -> None:
    for seed in range(40):
        slices = scene("late_answer", seed, CHAT).slices
        at = next(number for number, one in enumerate(slices) if one.tag == "late")
        assert slices[at].weight == 1.0
        assert slices[at - 1].weight == 0.0
        assert [one.weight for one in slices].count(0.0) in (1, 2)


def test_the_user_thinks_behind_words_that_leave_the_query_open() -> None:
    lists = json.loads(LISTS.read_text())
    asks = tuple(unpunctuated(text).split()[-1] for text in lists["hesitation"])
    for seed in range(60):
        slices = scene("pause", seed, CHAT).slices
        for number, one in enumerate(slices):
            if one.tag == "pause" and slices[number - 1].user is not None:
                last = unpunctuated(str(slices[number - 1].user)).split()[-1]
                assert last in OPEN or last in asks, last


def test_a_correction_names_what_was_meant() -> None:
    seen = 0
    for seed, chat in enumerate(OTHERS * 3):
        try:
            made = scene("late_correction", seed, chat)
        except UnfitError:
            continue
        at = next(number for number, one in enumerate(made.slices) if one.tag == "side")
        starts = [n for n, one in enumerate(made.slices[:at]) if one.tag in STARTS]
        turn = chat.turns[len(starts) - 1]
        assert told(made.slices[at:]).startswith(turn.agent)
        assert turn.user.split()[-1].strip(".?!,") in heard(made.slices[starts[-1] :])
        seen += 1
    assert seen > 20


def test_topics_take_turns_each_in_its_order() -> None:
    made = scene("interweave", 3, CHAT)
    for one in (CHAT, *made.used):
        words = " ".join(turn.user for turn in one.turns).split()
        assert in_order(words, heard(made.slices).split())
    assert len(made.used) in (1, 2)


def recipe(**said: Any) -> DuplexRecipe:
    sources = [{"path": str(path)} for path in SHIPPED]
    return DuplexRecipe.model_validate({"kind": "duplex", "sources": sources, **said})


def built(made: DuplexRecipe) -> tuple[list[tuple[str, Dialogue]], Builder]:
    files = {f"sources.{n}.path": Path(s.path) for n, s in enumerate(made.sources)}
    builder = Builder(made, {**files, "transitions": Path(str(made.transitions))})
    return list(builder.dialogues()), builder


@pytest.fixture(scope="module")
def starter() -> tuple[list[tuple[str, Dialogue]], Builder]:
    return built(recipe(limit=1500, seed=17))


def test_splits_share_no_chat_no_query_and_no_transition(
    starter: tuple[list[tuple[str, Dialogue]], Builder],
) -> None:
    found = starter[0]
    texts: dict[str, dict[str, set[str]]] = {}
    queries = {
        chat.id: {unpunctuated(turn.user) for turn in chat.turns if len(turn.user.split()) >= 4}
        for chat in all_chats()
    }
    for split, one in found:
        held = texts.setdefault(split, {"chats": set(), "queries": set(), "transitions": set()})
        held["chats"] |= set(one.meta["chats"])
        held["queries"] |= {text for chat in one.meta["chats"] for text in queries[chat]}
        held["transitions"] |= set(one.meta.get("transitions", ()))
    assert set(texts) == {"train", "dev", "test"}
    for what in ("chats", "queries", "transitions"):
        assert not texts["train"][what] & (texts["dev"][what] | texts["test"][what])
        assert not texts["dev"][what] & texts["test"][what]


def test_a_transition_is_heard_where_the_row_says_so(
    starter: tuple[list[tuple[str, Dialogue]], Builder],
) -> None:
    for _, one in starter[0]:
        words = unpunctuated(heard(list(one.slices))).split()
        for said in one.meta.get("transitions", ()):
            kind, _, text = said.partition(": ")
            if kind in ("stop", "noise") and len(one.slices) < 96:
                assert in_order(unpunctuated(text).split(), words), said


def test_shares_are_those_of_the_mix(
    starter: tuple[list[tuple[str, Dialogue]], Builder],
) -> None:
    counted = Counter(one.kind for _, one in starter[0])
    for kind, share in MIX.items():
        assert counted[kind] / 1500 == pytest.approx(share, abs=0.04), kind
    figures = starter[1].audit.metrics()
    assert figures["unpunctuated_share"] == pytest.approx(0.5, abs=0.04)


def test_the_audit_counts_what_is_there(
    starter: tuple[list[tuple[str, Dialogue]], Builder],
) -> None:
    found, builder = starter
    values = builder.audit.values()
    slices = [one for _, each in found for one in each.slices]
    figures = values["metrics"]
    assert figures["slices"] == len(slices)
    assert figures["idle_ratio"] == round(sum(s.agent is None for s in slices) / len(slices), 4)
    for split in ("train", "dev", "test"):
        assert figures[f"{split}_dialogues"] == sum(name == split for name, _ in found)
    spoken = Counter(s.tag for s in slices if s.agent is not None)
    assert {t: c["spoken"] for t, c in values["tags"].items() if "spoken" in c} == dict(spoken)
    rows = [str([(s.user, s.agent) for s in each.slices]) for _, each in found]
    assert figures["duplicate_rate"] == round(1 - len(set(rows)) / len(rows), 4)
    assert figures["leaked_chats"] == figures["leaked_turns"] == 0
    assert figures["leaked_transitions"] == 0


def test_leaks_are_found(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "Where do the storks spend the winter?"}
    path = tmp_path / "chats.jsonl"
    answers = [{"role": "assistant", "content": f"South of here, {n}."} for n in range(200)]
    path.write_text("".join(json.dumps({"messages": [asked, a]}) + "\n" for a in answers))
    figures = built(recipe(sources=[{"path": str(path)}]))[1].audit.metrics()
    assert figures["leaked_turns"] == 1.0
    assert figures["leaked_chats"] == 0.0


def test_the_same_seed_gives_the_same_dialogues_and_another_one_others() -> None:
    first, again, other = (
        [one.values() for _, one in built(recipe(limit=60, seed=seed))[0]] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_what_is_held_out_does_not_depend_on_the_seed() -> None:
    splits: dict[str, set[str]] = {}
    for seed in (1, 2):
        for split, one in built(recipe(limit=400, seed=seed))[0]:
            for chat in one.meta["chats"]:
                splits.setdefault(chat, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


def test_half_of_the_chats_can_be_held_out() -> None:
    shares = HeldOut(dev=0.25, test=0.25)
    keys = [f"{random.Random(n).getrandbits(64):016x}" for n in range(4000)]
    counted = Counter(split_of(key, shares) for key in keys)
    assert counted["train"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert counted["test"] / 4000 == pytest.approx(0.25, abs=0.03)


def test_dialogues_are_as_they_were_for_a_seed(tmp_path: Path) -> None:
    path = tmp_path / "bees.jsonl"
    sides = [("user", "assistant")[n % 2] for n in range(6)]
    texts = [text for turn in TURNS for text in (turn.user, turn.agent)]
    messages = [{"role": s, "content": t} for s, t in zip(sides, texts, strict=True)]
    path.write_text(json.dumps({"messages": messages}))
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps(GOLDEN_LISTS))
    said = {"sources": [{"path": str(path)}], "transitions": str(lists), "seed": 5}
    found = built(recipe(limit=24, held_out={"dev": 0, "test": 0}, **said))[0]
    golden = Path(__file__).parent / "duplex_golden.jsonl"
    assert [one.values() for _, one in found] == [
        json.loads(line) for line in golden.read_text(encoding="utf-8").splitlines()
    ], "raise the stage's version if this is meant, and write the file anew"


GOLDEN_LISTS = {
    "stop": ["Please stop.", "Be quiet for a moment, will you?"],
    "rephrase": ["That's not what I meant."],
    "reset": ["Something else."],
    "side": ["Are you sure? => Quite sure."],
    "resume": ["As I was saying,"],
    "backchannel": ["uh-huh"],
    "noise": ["Mark, dinner is ready!"],
    "hesitation": ["um"],
    "correction": ["Sorry, {}."],
    "opener": ["Sure."],
    "lead": ["Tell me,"],
    "tail": ["please"],
}


def test_a_files_chats_are_read_in_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    messages = [("system", "Be kind."), ("user", "Hi"), ("user", "there"), ("assistant", "Hello!")]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in messages]},
        {
            "conversations": [
                {"from": "gpt", "value": "Yes?"},
                {"from": "human", "value": " a  b "},
                {"from": "gpt", "value": "c\n\nd"},
                {"from": "human", "value": "e"},
            ]
        },
        {"messages": [{"role": "assistant", "content": "Nobody asked."}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(chats.read(path, "auto"))
    assert [one.turns for one in found if isinstance(one, Chat)] == [
        (Turn("Hi there", "Hello!"),),
        (Turn("a b", "c\n\nd"),),
    ]
    assert found[2] is None


def test_rows_of_duplex_ultrachat_come_back_as_they_were() -> None:
    for kind in MIX:
        try:
            made = scene(kind, 4, CHAT)
        except UnfitError:
            continue
        row = ultrachat.to_row(Dialogue("x", kind, tuple(made.slices)))
        again = ultrachat.of_row(row, id="x", kind=kind)
        assert [(s.user, s.agent) for s in again.slices] == [(s.user, s.agent) for s in made.slices]
        assert ultrachat.to_row(again) == row


def test_tags_of_foreign_slices_are_told_from_who_speaks() -> None:
    pairs = [("a b", None), (None, None), ("c d", "x"), (None, "y"), (None, None)]
    assert ultrachat.tags(pairs) == ["mid", "pause", "end", "cont", "quiet"]
    stopped = [("a", "x"), (None, "y"), ("be quiet", None), (None, None), ("b", "z")]
    assert ultrachat.tags(stopped) == ["end", "cont", "stop", "quiet", "end"]
    again = [("a", "x"), ("no I", None), ("meant b", "y"), (None, None), (None, "z")]
    assert ultrachat.tags(again) == ["end", "barge", "side", "quiet", "late"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ([], "not a list"),
        ([{"role": "assistant", "content": "x"}], "slice 0 of `output` is not of the role user"),
        ([{"role": "user", "content": 1}], "needs `role` and `content`"),
    ],
)
def test_a_wrong_row_of_slices_is_refused(output: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ultrachat.of_row({"output": output}, id="x")


def test_slices_of_others_are_taken_as_they_are_and_once(tmp_path: Path) -> None:
    path = tmp_path / "ultra.jsonl"
    row = ultrachat.to_row(Dialogue("x", "basic", tuple(scene("basic", 1, CHAT).slices)))
    path.write_text(json.dumps(row) + "\n")
    found, builder = built(recipe(sources=[{"path": str(path), "kind": "basic"}], limit=9))
    assert len(found) == 1
    assert ultrachat.to_row(found[0][1]) == row
    assert builder.audit.read == 1


def test_what_a_dialogue_is_to_show_is_within_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    sides = [("user", "Tell me all about that, will you?"), ("assistant", "There is much. " * 90)]
    messages = [{"role": side, "content": f"{text} {n}"} for n in range(20) for side, text in sides]
    path.write_text(json.dumps({"messages": messages}))
    said = {"sources": [{"path": str(path)}], "limit": 40, "mix": {"termination": 1.0}}
    found = built(recipe(**said, max_slices=60))[0]
    assert all(len(one.slices) <= 60 for _, one in found)
    assert all(any(s.tag == "stop" for s in one.slices) for _, one in found)


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as stream:
            for number in range(rows):
                said = [
                    ("user", f"What is {number} plus one, please?"),
                    ("assistant", "More. " * 50),
                ]
                messages = [{"role": role, "content": text} for role, text in said]
                stream.write(json.dumps({"messages": messages}) + "\n")
        made = recipe(sources=[{"path": str(path)}])
        files = {"sources.0.path": path, "transitions": Path(str(made.transitions))}
        tracemalloc.start()
        for _ in Builder(made, files).dialogues():
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(200), peak(2000)
    assert many - few < 1800 * 500, "hashes of rows take some 300 bytes each, until they are full"


def test_a_sketch_is_exact_while_it_has_room_and_near_it_later() -> None:
    values = [str(n % 700) for n in range(1000)]
    exact, small = Sketch(), Sketch(64)
    for value in values:
        exact.add(value)
        small.add(value)
    assert exact.repeated == pytest.approx(0.3)
    assert small.repeated == pytest.approx(0.3, abs=0.12)
    other = Sketch()
    for number in range(350, 1400):
        other.add(str(number))
    assert exact.shared(other) == pytest.approx(0.5)


def test_items_of_a_list_are_in_one_split_each() -> None:
    items = [str(number) for number in range(40)]
    found = transitions.divided(items, 0.15)
    assert sorted(text for split in found.values() for text in split) == sorted(items)
    assert [len(found[split]) for split in ("train", "dev", "test")] == [28, 6, 6]
    assert transitions.divided(items[:2], 0.15)["test"] == items[:2]
    assert transitions.divided(items, 0.0)["dev"] == items


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[]", "is not an object of lists"),
        ('{"stopp": ["x"]}', "did you mean `stop`?"),
        ('{"stop": []}', "`stop` is not a list of texts"),
        ('{"stop": ["x", ""]}', "item 1 of `stop` is not a text"),
    ],
)
def test_a_file_of_lists_says_what_is_wrong_with_it(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "lists.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        transitions.read(path, 0.1)


def test_every_list_that_ships_has_forty_items_or_more() -> None:
    lists = json.loads(LISTS.read_text(encoding="utf-8"))
    assert set(lists) == set(transitions.LISTS)
    assert all(len(set(items)) >= 40 for items in lists.values())


def test_chats_that_ship_are_many_and_none_twice() -> None:
    found = all_chats()
    queries = [turn.user.lower() for chat in found for turn in chat.turns]
    assert len({chat.id for chat in found}) == len(found) >= 250
    assert len(set(queries)) >= 600
    assert len(set(queries)) == len(queries)


def test_every_interaction_of_a_mix_has_a_function() -> None:
    assert list(MIX) == list(INTERACTIONS)
    assert sum(MIX.values()) == pytest.approx(1.0)
