"""`bmkit duplex build`: data as any stage leaves them, and bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bmkit.data.slices import dialogue

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

CHAT = [
    {"role": "user", "content": "Where do swifts sleep when they are on their way south?"},
    {"role": "assistant", "content": "In the air. They rise high and doze while they glide."},
]


def chats(path: Path, count: int) -> Path:
    rows = []
    for number in range(count):
        asked = {"role": "user", "content": f"And how many of the {number} swifts come back?"}
        rows.append({"messages": [*CHAT, asked, {"role": "assistant", "content": "Most do."}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_starter_needs_no_input_and_no_model(bmkit: Run, tmp_path: Path) -> None:
    done = bmkit("duplex", "build", "starter", "-o", "data", "-s", "limit=120")
    assert (done.returncode, done.stdout) == (0, "data\n"), done.stderr
    found = {
        split: list(dialogue.read(tmp_path / "data" / f"{split}.jsonl"))
        for split in ("train", "dev", "test")
    }
    assert sum(map(len, found.values())) == 120
    wrong = bmkit("merge", "-m", "data", "-o", "m")
    assert wrong.returncode == 3 and "data is data; `bmkit merge` takes" in wrong.stderr
    again = bmkit("duplex", "build", "-o", "data", "-s", "limit=120", "--json")
    values = json.loads(again.stdout)
    assert (values["kind"], values["reused"]) == ("data", True)
    assert values["metrics"]["dialogues"] == 120
    audit = json.loads((tmp_path / "data" / "audit.json").read_text())
    assert audit["metrics"] == values["metrics"]
    forced = json.loads(
        bmkit("duplex", "build", "-o", "data", "-s", "limit=120", "--force", "--json").stdout
    )
    assert (forced["reused"], forced["digest"]) == (False, values["digest"])
    other = bmkit("duplex", "build", "-o", "data", "-s", "limit=121")
    assert other.returncode == 3
    assert "another recipe" in other.stderr


def test_data_of_ones_own_take_the_place_of_what_ships(bmkit: Run, tmp_path: Path) -> None:
    chats(tmp_path / "mine.jsonl", 60)
    words = ("duplex", "build", "--data", "mine.jsonl", "-s", "limit=null", "--json")
    done = bmkit(*words, "-o", "a")
    assert json.loads(done.stdout)["metrics"]["dialogues"] == 60
    text = (tmp_path / "a" / "train.jsonl").read_text()
    assert "swifts" in text
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "mine.jsonl").read_bytes())
    moved = json.loads(bmkit(*words[:3], "moved.jsonl", *words[4:], "-o", "b").stdout)
    assert moved["key"] == json.loads(done.stdout)["key"]
    assert moved["digest"] == json.loads(done.stdout)["digest"], "a place has got into the data"


def test_few_chats_leave_nothing_to_calibrate_on_which_is_said(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    built = bmkit("duplex", "build", "-s", "limit=1", "-o", "a")
    assert "no dialogue is in dev" in built.stderr
    planned = bmkit("tune", "duplex", "-m", tiny, "--data", "a", "--plan")
    assert planned.returncode == 0, planned.stderr
    assert "no data.dev to calibrate it on" in planned.stderr
    said = bmkit("tune", "duplex", "-m", tiny, "--data", "a", "--plan", "-s", "slice.threshold=0.5")
    assert "calibrate" not in said.stderr


def test_what_was_built_is_shown_and_can_be_built_again(bmkit: Run, tmp_path: Path) -> None:
    bmkit("duplex", "build", "-o", "data", "-s", "limit=50", "-q")
    shown = bmkit("show", "data").stdout
    assert "kind     data" in shown
    assert "metric   dialogues = 50" in shown
    assert "basic" in shown
    (tmp_path / "again.yaml").write_text(bmkit("log", "data", "--format", "yaml").stdout)
    done = bmkit("run", "again.yaml", "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(bmkit("show", "data", "--json").stdout)
    assert json.loads(done.stdout)["digest"] == first["digest"]
    assert bmkit("verify", "data").returncode == 0


def test_a_plan_builds_nothing(bmkit: Run, tmp_path: Path) -> None:
    done = bmkit("duplex", "build", "--plan", "--json", "-o", "data")
    plan = json.loads(done.stdout)
    assert "basic 20%" in plan["steps"][0]
    assert plan["peak"]["disk_bytes"] > 0
    assert "model" not in plan["inputs"]
    assert not (tmp_path / "data").exists()


def test_a_pipeline_trains_on_what_it_has_built(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "- duplex: starter\n  set: {limit: 12}\n- tune: lora\n  model: tiny\n"
    )
    assert bmkit("validate", "p.yaml").returncode == 0
    planned = json.loads(bmkit("run", "p.yaml", "--plan", "--json").stdout)
    assert [one["stage"] for one in planned] == ["duplex", "tune"]
    done = bmkit("run", "p.yaml")
    assert done.returncode == 0, done.stderr
    trained = json.loads((Path(done.stdout.strip()) / "bmkit.json").read_text())
    assert "dev_idle_f1" in trained["metrics"], "rows in slices are what it was trained on"


def test_a_pipeline_without_a_model_behind_its_data_is_refused(bmkit: Run, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("- duplex: starter\n- compress: int8\n")
    done = bmkit("validate", "p.yaml")
    assert done.returncode == 2
    assert "needs `pull` or `model`" in done.stderr


def test_a_killed_build_leaves_nothing(tmp_path: Path) -> None:
    chats(tmp_path / "many.jsonl", 200)
    words = ("duplex", "build", "--data", "many.jsonl", "-o", "data", "-s", "limit=1000000")
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", *words, "--progress", "lines"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".data*/train.jsonl")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not (tmp_path / "data").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"many.jsonl", "bmkit-home"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"messages": [\n', ":1: it is not JSON"),
        ("", "holds no rows"),
        ("[1]\n", ":1: it is not a JSON object"),
        ('{"mesages": []}\n', "did you mean `messages`?"),
        ('{"messages": [{"role": "usr", "content": "x"}]}\n', "did you mean `user`?"),
        ('{"messages": [{"role": "user", "content": 3}]}\n', "both text"),
        ('{"conversations": [{"from": "human"}]}\n', "`from` and `value`"),
        ('{"conversations": [{"from": "dog", "value": "x"}]}\n', "`dog` is not a role"),
        ('{"output": [{"role": "assistant", "content": "x"}]}\n', "is not of the role user"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}\n',
            "holds a query with its answer",
        ),
    ],
)
def test_rows_that_are_no_chats_are_refused(
    bmkit: Run, tmp_path: Path, rows: str, said: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows)
    done = bmkit("duplex", "build", "--data", "rows.jsonl", "-o", "data")
    assert done.returncode == 3, done.stderr
    assert said in done.stderr
    assert "rows.jsonl" in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-s", "mix.terminaton=1"], 2, "did you mean `termination`?"),
        (["-s", "mix.basic=0"], 2, "sum to 0"),
        (["-s", "mix.basic=-1"], 2, "below 0"),
        (["-s", "sources.0.format=mesages"], 2, "did you mean `messages`?"),
        (["-s", "slice.user_words=[4, 2]"], 2, "no range"),
        (["-s", "held_out={dev: 0.5, test: 0.5}"], 2, "nothing to train on"),
        (["-s", "unpunctated=1"], 2, "did you mean `unpunctuated`?"),
        (["-s", "kv={high: 20, low: 30}"], 2, "not below `high`"),
        (["-s", "sources=[]"], 3, "no chats to build from"),
        (["--data", "gone.jsonl"], 3, "is not there"),
        (["--data", "."], 3, "is a directory"),
        (["-s", "transitions=gone.json"], 3, "is not there"),
        (["-o", "."], 3, "."),
        (["strater"], 2, "did you mean `starter`?"),
    ],
)
def test_what_is_wrong_is_said(bmkit: Run, words: list[str], code: int, said: str) -> None:
    done = bmkit("duplex", "build", *words, *([] if "-o" in words else ["-o", "data"]))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
