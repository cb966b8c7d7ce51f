"""`bmkit duplex eval` as a command: what it prints, what it leaves, what it refuses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

ROW: dict[str, Any] = {
    "slices": [
        {"u": "What do", "a": None, "tag": "mid"},
        {"u": "cats eat?", "a": "Mice.", "tag": "end"},
        {"u": None, "a": None, "tag": "quiet"},
    ],
}


@pytest.fixture
def duplex(tiny: Path) -> Path:
    """The tiny checkpoint with the marks of slices: `tmp_path/tiny`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bmkit.data.slices import stored, tokens

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    marked = tokens.mark(tokenizer, "idle", "added")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    stored.write(tiny, stored.Stored("idle", marked.layout, agent_tokens=4))
    return tiny


def test_it_prints_the_report_s_path_alone(
    bmkit: Run, duplex: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows("talk.jsonl", ROW)
    done = bmkit("duplex", "eval", "-m", "tiny", "--data", "talk.jsonl", "-o", "r")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "r\n"
    files = {p.name for p in (tmp_path / "r").iterdir()}
    wanted = {"bmkit.json", "report.json", "report.md", "timeline.svg", "conversations.jsonl"}
    wanted.add("decisions.jsonl")
    assert files == wanted
    again = bmkit("duplex", "eval", "-m", "tiny", "--data", "talk.jsonl", "-o", "r", "--json")
    told = json.loads(again.stdout)
    assert told["reused"]
    assert told["kind"] == "report"
    values = json.loads((tmp_path / "r/report.json").read_text())
    rate = values["suites"]["replay"]["punctuated"]["model"]["unanswered_rate"]
    assert told["metrics"]["replay_punctuated_unanswered_rate"] == rate
    log = bmkit("log", "r")
    assert log.returncode == 0, log.stderr


def test_how_long_slices_took_is_reported_beside_the_artifact(
    bmkit: Run, duplex: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows("talk.jsonl", ROW)
    done = bmkit(
        *("duplex", "eval", "-m", "tiny", "--data", "talk.jsonl", "-o", "r"),
        *("--report", "t.json", "-s", "eval.suites=[replay]"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "t.json").read_text())
    assert 0 < told["slice_ms_p50"] <= told["slice_ms_p95"] <= told["slice_ms_max"]
    assert told["slices"] == 2 * (3 + 3)  # in both conditions, silence behind the dialogue included


def test_bounds_that_are_not_met_are_exit_5(
    bmkit: Run, duplex: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows("talk.jsonl", ROW)
    gate = "gates={decision_punctuated_lead: {min: 0.5}}"
    call = ("duplex", "eval", "-m", "tiny", "--data", "talk.jsonl", "-o", "r")
    done = bmkit(*call, "-s", gate, "-s", "eval.suites=[decision]")
    assert done.returncode == 5
    assert "decision_punctuated_lead" in done.stderr
    assert (tmp_path / "r/report.json").is_file()


def test_data_that_was_built_is_measured_on_its_test_split(
    bmkit: Run, duplex: Path, tmp_path: Path
) -> None:
    done = bmkit("duplex", "build", "starter", "-o", "data", "-s", "limit=60")
    assert done.returncode == 0, done.stderr
    call = ("duplex", "eval", "-m", "tiny", "-o", "r", "-s", "eval.suites=[decision]")
    done = bmkit(*call, "--data", "data")
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "r/report.json").read_text())
    lines = (tmp_path / "data/test.jsonl").read_text().splitlines()
    assert values["dialogues"]["count"] == len(lines)
    done = bmkit(*call, "--data", "r")
    assert done.returncode == 3
    assert "r is a report, not data" in done.stderr


def test_without_data_bmkit_s_own_dialogues_are_taken(
    bmkit: Run, duplex: Path, tmp_path: Path
) -> None:
    limits = ("-s", "eval.limit=2", "-s", "eval.suites=[decision]")
    done = bmkit("duplex", "eval", "-m", "tiny", "-o", "r", *limits)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "r/report.json").read_text())
    assert values["dialogues"]["count"] == 2
    manifest = json.loads((tmp_path / "r/bmkit.json").read_text())
    own = manifest["steps"][-1]["inputs"]["eval.data"]
    assert own["digest"] == values["dialogues"]["sha256"]


def test_a_plan_says_what_would_be_measured(bmkit: Run, duplex: Path, tmp_path: Path) -> None:
    done = bmkit("duplex", "eval", "-m", "tiny", "-o", "r", "--plan", "--json")
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert [step.partition(":")[0] for step in steps] == ["decision", "replay", "simulate"]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ("{", "talk.jsonl:1: it is not JSON"),
        ('{"slices": []}', "talk.jsonl:1: it has no `slices`"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "talk.jsonl:1: it has no `slices`"),
        ('{"slices": [{"u": "Hi", "tag": "ends"}]}', "did you mean `end`"),
        ('{"slices": [{"u": " ", "tag": "end"}]}', "neither text nor null"),
    ],
)
def test_dialogues_that_are_none_are_named(
    bmkit: Run, duplex: Path, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "talk.jsonl").write_text(text)
    done = bmkit("duplex", "eval", "-m", "tiny", "--data", "talk.jsonl", "-o", "r")
    assert done.returncode == 3, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_what_is_not_there_or_not_known_is_refused(
    bmkit: Run, duplex: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = bmkit("duplex", "eval", "-m", "tiny", "--data", "nothing.jsonl")
    assert (done.returncode, "no such file" in done.stderr) == (3, True)
    (tmp_path / "empty").mkdir()
    done = bmkit("duplex", "eval", "-m", "tiny", "--data", "empty")
    assert (done.returncode, "has no test.jsonl" in done.stderr) == (3, True)
    done = bmkit("duplex", "eval", "-m", tiny_checkpoint)
    assert (done.returncode, "bmkit tune duplex" in done.stderr) == (3, True)
    done = bmkit("duplex", "eval", "-m", "tiny", "-s", "eval.suites=[decicion]")
    assert (done.returncode, "decision" in done.stderr) == (2, True)
    done = bmkit("duplex", "eval", "-m", "tiny", "-s", "gates={unanswered_rate: {max: 0}}")
    assert done.returncode == 2
    done = bmkit("duplex", "eval", "evil", "-m", "tiny")
    assert (done.returncode, "did you mean `eval`" in done.stderr) == (2, True)


def test_a_pipeline_measures_what_the_stage_before_it_has_left(
    bmkit: Run, duplex: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows("talk.jsonl", ROW)
    (tmp_path / "p.yaml").write_text(
        "- pull: tiny\n- duplex-eval: eval\n  data: talk.jsonl\n  out: r\n"
        "  set: {eval.suites: [decision]}\n- infer: greedy\n  prompt: Hi\n  max_new_tokens: 2\n"
    )
    planned = bmkit("run", "p.yaml", "--plan")
    assert planned.returncode == 0, planned.stderr
    done = bmkit("run", "p.yaml")
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "r/report.json").read_text())
    assert values["dialogues"]["count"] == 1
    told = bmkit("log", "r", "--format", "yaml")
    assert told.returncode == 0, told.stderr
    assert "duplex-eval:" in told.stdout
    (tmp_path / "again.yaml").write_text(told.stdout)
    assert bmkit("validate", "again.yaml").returncode == 0
