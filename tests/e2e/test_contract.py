"""The command line's promises, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_stdout_holds_the_path_as_given_and_nothing_else(bmkit: Run, tiny: Path) -> None:
    done = bmkit("compress", "int8", "-m", "tiny", "-o", "a")
    assert (done.returncode, done.stdout) == (0, "a\n"), done.stderr


def test_without_out_the_absolute_path_in_the_cache_is_printed(
    bmkit: Run, tiny: Path, home: Path
) -> None:
    done = bmkit("compress", "int8", "-m", "tiny", "--json")
    found = json.loads(done.stdout)
    assert Path(found["path"]) == home / "artifacts" / f"compress-int8-{found['key'][:8]}"


def test_an_unchanged_stage_is_reused_and_a_changed_one_is_not(bmkit: Run, tiny: Path) -> None:
    first, again, other = (
        json.loads(bmkit("compress", "int8", "-m", "tiny", "--json", *more).stdout)
        for more in ((), (), ("-s", "steps.0.bits=4", "-s", "steps.0.group_size=32"))
    )
    assert [first["reused"], again["reused"], other["reused"]] == [False, True, False]
    assert first["key"] == again["key"] != other["key"]
    assert {"path", "kind", "digest", "key", "reused", "metrics", "seconds"} <= set(first)


def test_the_key_follows_the_models_content_not_its_place(bmkit: Run, tiny: Path) -> None:
    tiny.rename(tiny.with_name("moved"))
    keys = [
        json.loads(bmkit("compress", "int8", "-m", m, "--plan", "--json").stdout)["key"]
        for m in ("moved",)
    ]
    (tiny.with_name("moved")).rename(tiny)
    keys.append(
        json.loads(bmkit("compress", "int8", "-m", "tiny", "--plan", "--json").stdout)["key"]
    )
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    keys.append(
        json.loads(bmkit("compress", "int8", "-m", "tiny", "--plan", "--json").stdout)["key"]
    )
    assert keys[0] == keys[1] != keys[2]


def test_same_key_same_bytes(bmkit: Run, tiny: Path, chats: Path) -> None:
    digests = [
        json.loads(
            bmkit(
                *("tune", "lora", "-m", "tiny", "--data", chats, "-o", out, "--json"),
                *("-s", "train.max_steps=3"),
            ).stdout
        )["digest"]
        for out in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_plan_builds_nothing_and_says_what_it_would(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    done = bmkit("compress", "int8", "-m", "tiny", "-o", "y", "--plan", "--json")
    plan = json.loads(done.stdout)
    assert {"inputs", "steps", "key", "reused", "peak"} <= set(plan)
    assert plan["peak"]["disk_bytes"] > 0
    assert not (tmp_path / "y").exists()


def test_planned_disk_holds_what_is_written(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    plan = json.loads(bmkit("compress", "int8", "-m", "tiny", "-o", "y", "--plan", "--json").stdout)
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "y").returncode == 0
    written = sum(f.stat().st_size for f in (tmp_path / "y").iterdir())
    assert written <= plan["peak"]["disk_bytes"]


def test_two_stages_pipe_and_log_names_both(
    sh: Callable[[str], subprocess.CompletedProcess[str]], tiny: Path, chats: Path
) -> None:
    done = sh(
        "bmkit compress int8 -m tiny -o a"
        " | bmkit tune lora -m - --data chats.jsonl -o b -s train.max_steps=2"
        " | bmkit infer -m - -p Hello --max-new-tokens 4 --json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "Hello"
    tree = sh("bmkit log b").stdout
    assert "tune lora" in tree and "compress int8" in tree


def test_log_writes_a_pipeline_that_finds_the_same_results(
    bmkit: Run, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    a = bmkit("compress", "int8", "-m", tiny).stdout.strip()
    b = json.loads(
        bmkit("tune", "lora", "-m", a, "--data", chats, "-s", "train.max_steps=2", "--json").stdout
    )
    text = bmkit("log", b["path"], "--format", "yaml").stdout
    (tmp_path / "again.yaml").write_text(text)
    again = bmkit("run", "again.yaml", "--json")
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert (found["key"], found["digest"], found["reused"]) == (b["key"], b["digest"], True)


def test_a_failure_upstream_is_said_by_its_own_command(
    sh: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    done = sh("bmkit compress int8 -m nowhere -o a | bmkit tune lora -m - -o b")
    assert done.returncode == 3
    assert done.stdout == ""
    assert "nowhere" in done.stderr and "the command before this one failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_waiting_stage_has_imported_no_torch(tiny: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", "compress", "int8", "-m", "-", "-o", "w"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    import time

    time.sleep(2)
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    status = Path(f"/proc/{process.pid}/status").read_text()
    out, err = process.communicate("tiny\n", timeout=120)
    assert "libtorch" not in maps
    resident = int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1])
    assert resident < 120_000  # KiB
    assert out == "w\n", err


def test_a_closed_reader_ends_the_run_quietly(
    sh: Callable[[str], subprocess.CompletedProcess[str]],
    tiny: Path,
    rows: Callable[..., Path],
) -> None:
    rows("p.jsonl", *({"prompt": f"{i}"} for i in range(60)))
    done = sh(
        "bmkit infer -m tiny -i p.jsonl --json --max-new-tokens 2 -s batch_size=1 | head -1 >first"
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_flag_wins_over_set_and_set_over_the_recipe(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("kind: infer\nmax_new_tokens: 9\n")
    counts = [
        len(
            json.loads(bmkit("infer", "r.yaml", "-m", "tiny", "-p", "a", "--json", *x).stdout)[
                "token_ids"
            ]
        )
        for x in (
            (),
            ("-s", "max_new_tokens=5"),
            ("-s", "max_new_tokens=5", "--max-new-tokens", "3"),
        )
    ]
    assert counts == [9, 5, 3]


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_exit_0_on_stdout(bmkit: Run, word: str) -> None:
    done = bmkit(word)
    assert done.returncode == 0 and "bmkit" in done.stdout and not done.stderr


def test_an_unknown_command_exits_2_and_names_the_nearest(bmkit: Run) -> None:
    done = bmkit("compres")
    assert done.returncode == 2 and "compress" in done.stderr and not done.stdout


def test_quiet_says_nothing_on_stderr(bmkit: Run, tiny: Path) -> None:
    done = bmkit("compress", "int8", "-m", "tiny", "-o", "a", "-q")
    assert (done.stdout, done.stderr) == ("a\n", "")


def test_progress_as_json_events(bmkit: Run, tiny: Path) -> None:
    done = bmkit("compress", "int8", "-m", "tiny", "-o", "a", "--progress", "json")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds[0] == "begin" and kinds.count("begin") == kinds.count("end")
    first = events[: kinds.index("end")]
    assert [e["done"] for e in first if e["event"] == "progress"][-1] == events[0]["total"]


def test_progress_elsewhere_is_a_line_per_tenth(bmkit: Run, tiny: Path) -> None:
    done = bmkit("compress", "int8", "-m", "tiny", "-o", "a")
    lines = [x for x in done.stderr.splitlines() if x.startswith("quantize to")]
    assert 8 <= len(lines) <= 10 and "100 %" in lines[-1]


def test_a_gate_that_is_not_met_exits_5_and_keeps_the_artifact(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    command = ("compress", "int8", "-m", "tiny", "-o", "a", "-s", "gates.bytes_ratio.max=0.1")
    first, again = bmkit(*command), bmkit(*command)
    assert first.returncode == again.returncode == 5
    assert first.stdout == again.stdout == ""
    assert "bytes_ratio" in first.stderr and (tmp_path / "a" / "bmkit.json").exists()
    met = bmkit("compress", "int8", "-m", "tiny", "-o", "a", "-s", "gates.bytes_ratio.max=0.3")
    assert (met.returncode, met.stdout) == (0, "a\n")


def test_library_chatter_never_reaches_stdout(bmkit: Run, tiny: Path, chats: Path) -> None:
    done = bmkit(
        "tune", "lora", "-m", "tiny", "--data", chats, "-o", "b", "-s", "train.max_steps=2"
    )
    assert done.stdout == "b\n", done.stderr


def test_environment_does_not_change_what_is_computed(bmkit: Run, tiny: Path) -> None:
    key = [
        json.loads(bmkit("compress", "int8", "-m", "tiny", "--plan", "--json", **env).stdout)["key"]
        for env in ({}, {"BMKIT_HOME": str(tiny.parent / "other")}, {"OMP_NUM_THREADS": "1"})
    ]
    assert len(set(key)) == 1


def test_run_executes_a_pipeline_with_the_shells_words(
    bmkit: Run, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(
        "- compress: int8\n  model: tiny\n  out: c\n"
        "- tune: lora\n  data: chats.jsonl\n  out: d\n  set: {train.max_steps: 2}\n"
        "- infer: greedy\n  prompt: Hello\n  max_new_tokens: 3\n"
    )
    done = bmkit("run", "p.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3
    assert os.path.isdir(tmp_path / "c") and os.path.isdir(tmp_path / "d")


def test_every_look_up_command_answers_on_stdout(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "a").returncode == 0
    for words, expected in (
        (("ls",), "compress/int8"),
        (("ls", "tune"), "tune/lora"),
        (("show", "int8"), "method: quantize"),
        (("show", "a"), "bytes_ratio"),
        (("validate", "tune/lora"), "valid"),
        (("validate", "quickstart"), "valid"),
        (("schema", "compress"), '"properties"'),
        (("log", "a", "--format", "json"), '"stage": "compress"'),
        (("verify", "a"), "whole"),
        (("cache", "ls"), "in all"),
        (("doctor",), "torch"),
    ):
        done = bmkit(*words)
        assert done.returncode == 0 and expected in done.stdout, (words, done)


def test_a_copied_recipe_still_finds_its_data(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    assert bmkit("cp", "lora", "mine.yaml").stdout == "mine.yaml\n"
    plan = bmkit("tune", "mine.yaml", "-m", "tiny", "--plan", "--json")
    builtin = bmkit("tune", "lora", "-m", "tiny", "--plan", "--json")
    assert json.loads(plan.stdout)["key"] == json.loads(builtin.stdout)["key"]
    assert bmkit("cp", "lora", "mine.yaml").returncode == 3


def test_progress_on_a_terminal_is_a_bar_with_time_left(tiny: Path, tmp_path: Path) -> None:
    import pty

    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", "compress", "int8", "-m", "tiny", "-o", "a"],
        stdout=subprocess.PIPE,
        stderr=side,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(side)
    seen = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    assert process.wait(60) == 0 and process.stdout is not None
    assert process.stdout.read() == b"a\n"
    os.close(main)
    text = seen.decode()
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in text and "tensors/s" in text


def test_a_pipelines_plan_builds_nothing_and_names_keys(
    bmkit: Run, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "p.yaml").write_text(
        "- compress: int8\n  model: ../tiny\n"
        "- tune: lora\n  set: {data.train: ../chats.jsonl, train.max_steps: 2}\n"
    )
    first = json.loads(bmkit("run", "sub/p.yaml", "--plan", "--json").stdout)
    assert first[0]["key"] and not first[0]["reused"] and "key" not in first[1]
    assert bmkit("run", "sub/p.yaml").returncode == 0
    again = json.loads(bmkit("run", "sub/p.yaml", "--plan", "--json").stdout)
    assert [entry["reused"] for entry in again] == [True, True]
