"""`bmkit duplex replay`: the same bytes for a seed; what can't be replayed is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, MambaConfig

from bmkit.data.slices import stored, transcript
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.stored import Stored
from bmkit.data.slices.transcript import Label, Said, Transcript

Run = Callable[..., subprocess.CompletedProcess[str]]

KNOWN = Stored("idle", Layout((250,), (251,), 252, 2), agent_tokens=6, threshold=0.02)
SAID = (
    Said(0, 1850, "can you tell me"),
    Said(1900, 3100, "about <idle> penguins 🙂"),
    Said(6000, 6900, "stop it"),
)


@pytest.fixture
def listener(tiny: Path) -> Path:
    """The tiny model, as if it had been trained: `duplex.json` is beside its weights."""
    stored.write(tiny, KNOWN)
    return tiny


@pytest.fixture
def talk(tmp_path: Path) -> Callable[..., Path]:
    """Write a transcript: `tmp_path/talk.jsonl`."""

    def write(*said: Said, scheme: str | None = "idle", slice_ms: int | None = 1000) -> Path:
        path = tmp_path / "talk.jsonl"
        given = Transcript("t", scheme, slice_ms, said or SAID, (Label(8000, "over"),))
        path.write_text("".join(line + "\n" for line in given.lines()), encoding="utf-8")
        return path

    return write


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "options",
    [(), ("--seed", 3, "-s", "sampling.temperature=1"), ("--quant", "int8", "--threads", 1)],
    ids=["greedy", "drawn", "int8"],
)
def test_a_replay_is_the_same_every_time(
    bmkit: Run, fresh: Run, listener: Path, talk: Callable[..., Path], options: tuple[Any, ...]
) -> None:
    words = ("duplex", "replay", talk(), "-m", listener, "--json", *options)
    first, second = bmkit(*words), fresh(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    found = rows(first.stdout)
    agents = [row for row in found if row["type"] == "agent"]
    assert [row["slice"] for row in agents] == list(range(len(agents))) and len(agents) >= 8
    assert {row["decision"] for row in agents} == {"speak", "listen"}
    assert all(len(row["ids"]) <= 6 for row in agents)
    heard = [row["text"] for row in found if row["type"] == "user"]
    assert heard == ["can you", "tell me", "about <idle> penguins", "🙂", "stop it"]
    clocks = {"seconds", "slice_ms", "tokens_per_second"}
    assert not clocks & {key for row in agents for key in row}


def test_other_seeds_draw_other_words(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    words = ("duplex", "replay", talk(), "-m", listener, "--json", "-s", "sampling.temperature=1")
    one, other = (rows(bmkit(*words, "--seed", seed).stdout) for seed in (1, 2))
    assert [row.get("ids") for row in one] != [row.get("ids") for row in other]


def test_what_a_replay_writes_is_a_transcript_that_replays_the_same(
    bmkit: Run, listener: Path, talk: Callable[..., Path], tmp_path: Path
) -> None:
    first = bmkit("duplex", "replay", talk(), "-m", listener, "--json").stdout
    (tmp_path / "again.jsonl").write_text(first, encoding="utf-8")
    read = transcript.read(tmp_path / "again.jsonl")
    assert len(read.agent) == first.count('"type": "agent"')
    second = bmkit("duplex", "replay", tmp_path / "again.jsonl", "-m", listener, "--json").stdout
    same = len(second.splitlines())
    assert first.splitlines()[1:same] == second.splitlines()[1:]


def test_a_transcript_comes_from_stdin(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    words = ("-m", listener, "--json")
    file = bmkit("duplex", "replay", talk(), *words)
    piped = bmkit("duplex", "replay", "-", *words, stdin=talk().read_text(encoding="utf-8"))
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == file.stdout
    both = bmkit("duplex", "replay", "-", "-m", "-", stdin="x")
    assert both.returncode == 2 and "stdin" in both.stderr
    broken = bmkit("duplex", "replay", "-", *words, stdin='{"type": "session"}\n{"t')
    assert broken.returncode == 3 and "stdin:2: it is not JSON" in broken.stderr


def test_without_json_both_sides_stand_beside_each_other(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    words = ("duplex", "replay", talk(), "-m", listener, "-s", "policy.max_wait_slices=null")
    quiet = bmkit(*words, "-s", "policy.tau=1e-30")
    assert quiet.returncode == 0, quiet.stderr
    lines = quiet.stdout.splitlines()
    assert lines[0].split() == ["1.0", "can", "you", "·"]
    assert lines[5].split() == ["6.0", "·", "·"]
    loud = bmkit(*words, "-s", "policy.tau=0.99").stdout
    assert all(len(line.split()) >= 3 for line in loud.splitlines())
    assert loud.replace("\n", "").isprintable()


def test_the_recipe_changes_how_it_runs(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    words = ("duplex", "replay", talk(), "-m", listener, "--json")
    fixed = ("-s", "slice.period_ms=2000", "-s", "slice.agent_tokens=2", "-s", "policy.tau=0.99")
    found = rows(bmkit(*words, *fixed).stdout)
    assert found[0]["slice_ms"] == 2000
    agents = [row for row in found if row["type"] == "agent"]
    assert {row["t"] % 2000 for row in agents} == {0}
    assert all(1 <= len(row["ids"]) <= 2 for row in agents)


def test_a_revision_is_taken_in(bmkit: Run, listener: Path, talk: Callable[..., Path]) -> None:
    said = (Said(0, 900, "their"), Said(0, 2000, "there", rev=1), Said(2500, 3000, "so"))
    words = ("duplex", "replay", talk(*said), "-m", listener, "--json", "-s", "policy.tau=1e-30")
    agents = [row for row in rows(bmkit(*words).stdout) if row["type"] == "agent"]
    assert [row.get("revised") for row in agents[:3]] == [None, 1, None]
    assert agents[1]["epoch"] == 1
    plain = talk(Said(0, 900, "there"), Said(2500, 3000, "so"))
    right = [
        row for row in rows(bmkit(*words[:2], plain, *words[3:]).stdout) if row["type"] == "agent"
    ]
    assert agents[2]["p_idle"] == right[2]["p_idle"]


def test_a_model_that_was_not_trained_says_how(
    bmkit: Run, tiny: Path, talk: Callable[..., Path]
) -> None:
    done = bmkit("duplex", "replay", talk(), "-m", tiny)
    assert done.returncode == 3 and not done.stdout
    assert "bmkit tune duplex -m" in done.stderr


def test_a_transcript_of_another_scheme_is_refused(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    done = bmkit("duplex", "replay", talk(scheme="state"), "-m", listener)
    assert done.returncode == 3
    assert "`state`" in done.stderr and "`idle`" in done.stderr


def test_a_recipe_of_another_scheme_is_refused(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    words = ("duplex", "replay", talk(), "-m", listener, "-s")
    done = bmkit(*words, "scheme=state")
    assert done.returncode == 2
    assert "scheme: it is `state`, and the model was trained with `idle`" in done.stderr
    assert bmkit(*words, "scheme=idle", "--plan").returncode == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"type": "user", "t": 10, "text": "x"}', "sort by time"),
        ("{", "it is not JSON"),
        ('{"type": "usr", "t": 9000}', "did you mean `user`"),
        ('{"type": "user", "t": 9000, "t_end": 8000, "text": "x"}', "before `t`"),
        ('{"type": "user", "t": 1700000000000, "text": "x"}', "over a week"),
    ],
)
def test_a_broken_transcript_is_refused_with_its_line(
    bmkit: Run, listener: Path, talk: Callable[..., Path], line: str, said: str
) -> None:
    path = talk()
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    done = bmkit("duplex", "replay", path, "-m", listener)
    assert done.returncode == 3 and not done.stdout
    assert f"{path}:6:" in done.stderr and said in done.stderr


def test_words_that_a_revision_takes_back_before_they_are_over_are_never_heard(
    bmkit: Run, listener: Path, talk: Callable[..., Path], tmp_path: Path
) -> None:
    said = (Said(1900, 3100, "about penguins"), Said(1900, 3400, "about pelicans", rev=1))
    revised = bmkit("duplex", "replay", talk(*said), "-m", listener, "--json").stdout
    heard = [row["text"] for row in rows(revised) if row["type"] == "user"]
    assert heard == ["about", "pelicans"]
    other = (Said(1900, 3100, "about pelicans"),)
    assert bmkit("duplex", "replay", talk(*other), "-m", listener, "--json").stdout == revised
    (tmp_path / "again.jsonl").write_text(revised)
    assert bmkit("duplex", "replay", "again.jsonl", "-m", listener, "--json").stdout == revised


def test_a_plan_names_no_place_of_what_is_not_written(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    done = bmkit("duplex", "replay", talk(), "-m", listener, "--plan")
    assert done.returncode == 0 and "needs" in done.stdout
    assert "out " not in done.stdout
    done = bmkit("duplex", "serve", "-m", listener, "--plan", "--json")
    assert json.loads(done.stdout)["path"] is None


def test_what_is_not_there_is_refused(bmkit: Run, listener: Path, tmp_path: Path) -> None:
    assert bmkit("duplex", "replay", tmp_path / "none.jsonl", "-m", listener).returncode == 3


def test_a_damaged_duplex_json_is_refused(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    (listener / stored.FILE).write_text("{}")
    done = bmkit("duplex", "replay", talk(), "-m", listener)
    assert done.returncode == 3 and "damaged" in done.stderr


def test_marks_that_the_model_does_not_have_are_refused(
    bmkit: Run, tiny: Path, talk: Callable[..., Path]
) -> None:
    stored.write(tiny, Stored("idle", Layout((250,), (251,), 9000, 2)))
    done = bmkit("duplex", "replay", talk(), "-m", tiny)
    assert done.returncode == 3 and "9000" in done.stderr


def test_a_model_that_can_take_nothing_back_is_refused(
    bmkit: Run, with_tokenizer: Callable[[Path], None], talk: Callable[..., Path], tmp_path: Path
) -> None:
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    with_tokenizer(tmp_path / "mamba")
    stored.write(tmp_path / "mamba", KNOWN)
    done = bmkit("duplex", "replay", talk(), "-m", "mamba")
    assert done.returncode == 4 and "can't take anything back" in done.stderr


def test_a_budget_that_is_too_small_says_which_would_do(
    bmkit: Run, listener: Path, talk: Callable[..., Path]
) -> None:
    done = bmkit("duplex", "replay", talk(), "-m", listener, "--cpu-memory", "1MiB")
    assert done.returncode == 4 and "the smallest that works" in done.stderr


def test_a_plan_opens_nothing(bmkit: Run, listener: Path, talk: Callable[..., Path]) -> None:
    done = bmkit("duplex", "replay", talk(), "-m", listener, "--plan", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak"]["ram_bytes"] > 0


def test_a_reader_that_goes_away_ends_it_quietly(
    sh: Callable[[str], Any], listener: Path, talk: Callable[..., Path]
) -> None:
    talk()
    done = sh("bmkit duplex replay talk.jsonl -m tiny --json | head -1; echo ${PIPESTATUS[0]}")
    assert done.stdout.splitlines()[-1] == "0"
    assert json.loads(done.stdout.splitlines()[0])["type"] == "session"


def test_ctrl_c_ends_it_with_130(listener: Path, talk: Callable[..., Path], tmp_path: Path) -> None:
    long = talk(*(Said(1000 * i, 1000 * i + 900, "go on with it") for i in range(4000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", "duplex", "replay", long, "-m", listener, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in said
    assert all(json.loads(line) for line in rest.splitlines())


def dialogue(draw: random.Random, number: int) -> dict[str, Any]:
    """Return a dialogue whose answers begin where the user's slice ends with a question mark."""
    before = [(draw.choice(["so", "well", "and"]), None, "mid") for _ in range(draw.randint(0, 2))]
    asked = (f"{draw.choice('abc')}?", "yes", "end")
    slices = [*before, asked, (None, None, "quiet")]
    rows = [{"u": u, "a": a, "tag": tag} for u, a, tag in slices]
    return {"id": str(number), "kind": "basic", "lang": "en", "slices": rows}


def test_a_delta_that_was_trained_answers_when_it_is_asked(
    bmkit: Run, tiny: Path, talk: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for name, count in (("train", 96), ("dev", 24)):
        draw = random.Random(name)
        lines = [json.dumps(dialogue(draw, i)) + "\n" for i in range(count)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines))
    words = (
        "-s",
        "train.max_steps=150",
        "-s",
        "train.learning_rate=0.01",
        "-s",
        "data.own_words=0",
    )
    words = (*words, "-s", "data.max_length=256", "-s", "merge=false", "-o", "d")
    made = bmkit("tune", "duplex", "-m", tiny, "--data", tmp_path / "data", *words)
    assert made.returncode == 0, made.stderr
    said = [Said(1000 * i, 1000 * i + 900, text) for i, text in ((0, "so"), (1, "b?"), (5, "and"))]
    words = ("duplex", "replay", talk(*said), "--json")
    found = bmkit(*words, "-m", "d")
    assert found.returncode == 0, found.stderr
    agents = [row for row in rows(found.stdout) if row["type"] == "agent"]
    assert [row["decision"] for row in agents[:6]] == ["listen", "speak", *["listen"] * 4]
    assert agents[1]["text"] == "yes"
    assert bmkit("merge", "-m", "d", "-o", "whole").returncode == 0
    merged = bmkit(*words, "-m", "whole").stdout
    agents_too = [row for row in rows(merged) if row["type"] == "agent"]
    assert [row["ids"] for row in agents] == [row["ids"] for row in agents_too]
