"""Runs that are stopped, at any moment: nothing half-written, and training goes on from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
Popen = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Popen]:
    def run(*arguments: object) -> Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "bmkit_cli", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=dict(os.environ),
            start_new_session=True,
        )

    return run


def until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


COMPRESS = ("compress", "int8", "-m", "tiny", "-o", "x")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
@pytest.mark.parametrize("stage", ["pull", "compress", "tune", "infer"])
def test_a_stopped_stage_leaves_nothing_and_runs_again(
    start: Callable[..., Popen],
    fresh: Run,
    tiny: Path,
    chats: Path,
    tmp_path: Path,
    stage: str,
    number: signal.Signals,
    code: int,
) -> None:
    words: tuple[object, ...] = {
        "pull": ("pull", "tiny", "-o", "x"),
        "compress": COMPRESS,
        "tune": (
            "tune",
            "lora",
            "-m",
            "tiny",
            "--data",
            chats,
            "-o",
            "x",
            "-s",
            "train.max_steps=30",
        ),
        "infer": ("infer", "-m", "tiny", "-i", "p.jsonl", "-o", "x", "--max-new-tokens", "400"),
    }[stage]
    if stage == "pull":  # large enough to be caught copying
        (tiny / "extra.txt").write_bytes(os.urandom(400_000_000))
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n' * 40)
    process = start(*words)
    until(lambda: (tmp_path / ".x.partial").exists() or process.poll() is not None)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == "" and "Traceback" not in err
    assert not (tmp_path / "x").exists()
    if number != signal.SIGKILL:
        assert not (tmp_path / ".x.partial").exists()
    if stage == "pull":
        (tiny / "extra.txt").unlink()
    if stage != "infer":
        again = fresh(*words)
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "x" / "bmkit.json").exists()
        assert not (tmp_path / ".x.partial").exists()


@pytest.fixture(scope="module")
def wide(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with layers so wide that compressing them takes a while."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide") / "wide"
    shutil.copytree(tiny_checkpoint, path)
    config = AutoConfig.from_pretrained(path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 8
    config.head_dim = 128
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("stage", ["compress", "tune", "infer"])
def test_a_stage_that_is_stopped_in_the_middle_of_its_work(
    start: Callable[..., Popen],
    fresh: Run,
    tiny: Path,
    wide: Path,
    chats: Path,
    home: Path,
    tmp_path: Path,
    stage: str,
    number: signal.Signals,
    code: int,
) -> None:
    """Not while libraries are being imported: a tenth of the work is done, or something written."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n' * 80)
    words: tuple[object, ...] = {
        "compress": ("compress", "int8", "-m", wide, "-o", "x", "-s", "steps.0.scale_search=10"),
        "tune": ("tune", "lora", "-m", "tiny", "--data", chats, "-o", "x"),
        "infer": ("infer", "-m", "tiny", "-i", "p.jsonl", "-o", "x", "--max-new-tokens", "400"),
    }[stage]
    if stage == "tune":
        words = (*words, "-s", "train.max_steps=400", "-s", "train.save_steps=20")
    process = start(*words)
    assert process.stderr is not None
    if stage == "tune":
        until(lambda: list((home / "work").glob("*/checkpoint-*/bmkit-whole")))
    elif stage == "infer":
        until(lambda: any(f.stat().st_size for f in tmp_path.glob(".x.partial")))
    else:
        assert "quantize to 8 bits: " in process.stderr.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    told = "the last checkpoint is kept" in err
    assert told == (stage == "tune" and number == signal.SIGINT)
    assert not (tmp_path / "x").exists()
    assert (tmp_path / ".x.partial").exists() == (number == signal.SIGKILL or stage == "infer")
    if stage == "infer":
        written = (tmp_path / ".x.partial").read_text()
        whole = written[: written.rfind("\n") + 1]
    if stage != "compress" or number == signal.SIGKILL:
        again = fresh(*words)
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "x").exists()
        assert not (tmp_path / ".x.partial").exists()
    if stage == "infer":  # rows that were done are not answered again
        found = (tmp_path / "x").read_text()
        assert whole and found.startswith(whole)
        assert f"{whole.count(chr(10))} rows are done, going on with the next" in again.stderr
        assert [json.loads(line)["id"] for line in found.splitlines()] == list(range(80))


def test_training_resumes_after_a_kill_with_the_same_result(
    start: Callable[..., Popen], fresh: Run, tiny: Path, chats: Path, home: Path, tmp_path: Path
) -> None:
    words = (
        *("tune", "lora", "-m", "tiny", "--data", chats, "--json"),
        *("-s", "train.max_steps=40", "-s", "train.save_steps=3", "-s", "data.dev=chats.jsonl"),
        *("-s", "deltas.0.lora_dropout=0.1"),  # so that random draws matter
    )
    whole = json.loads(fresh(*words, "-o", "whole").stdout)
    process = start(*words, "-o", "stopped")
    work = home / "work"
    until(lambda: list(work.glob("*/checkpoint-*/bmkit-whole")) or process.poll() is not None)
    process.kill()
    process.communicate()
    assert not (tmp_path / "stopped").exists()
    resumed = fresh(*words, "-o", "stopped")
    assert "going on from step" in resumed.stderr
    found = json.loads(resumed.stdout)
    assert found["metrics"] == whole["metrics"]
    assert found["digest"] == whole["digest"]
    assert not any(work.iterdir())


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(
    start: Callable[..., Popen], fresh: Run, tiny: Path, chats: Path, home: Path
) -> None:
    words = (
        *("tune", "lora", "-m", "tiny", "--data", chats, "--json", "-o", "x"),
        *("-s", "train.max_steps=40", "-s", "train.save_steps=3"),
    )
    process = start(*words)
    until(lambda: list((home / "work").glob("*/checkpoint-*/bmkit-whole")))
    process.kill()
    process.communicate()
    newest = max((home / "work").glob("*/checkpoint-*"), key=lambda p: int(p.name[11:]))
    half = newest.with_name(f"checkpoint-{int(newest.name[11:]) + 3}")
    shutil.copytree(newest, half)
    (half / "bmkit-whole").unlink(missing_ok=True)
    (half / "learned.safetensors").write_bytes(b"cut off")
    again = fresh(*words)
    assert again.returncode == 0, again.stderr


def test_two_runs_into_the_same_out_at_once(
    start: Callable[..., Popen], fresh: Run, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    words = ("tune", "lora", "-m", "tiny", "--data", chats, "-s", "train.max_steps=60")
    first = start(*words, "-o", "x")
    until(lambda: (tmp_path / ".x.partial").exists())
    second = fresh(*words, "-o", "x")
    assert second.returncode == 3 and "another bmkit" in second.stderr, second.stderr
    out, err = first.communicate(timeout=120)
    assert (first.returncode, out) == (0, "x\n"), err


def test_two_identical_runs_into_the_cache_build_once(
    start: Callable[..., Popen], tiny: Path
) -> None:
    both = [start("compress", "int8", "-m", "tiny", "--json") for _ in range(2)]
    found = [json.loads(p.communicate(timeout=120)[0]) for p in both]
    assert found[0]["digest"] == found[1]["digest"]
    assert sorted(f["reused"] for f in found) == [False, True]
    assert (Path(found[0]["path"]) / "model.safetensors").is_file()


def test_a_loss_that_is_not_a_number_exits_5_and_keeps_the_last_checkpoint(
    fresh: Run, tiny: Path, chats: Path, home: Path, tmp_path: Path
) -> None:
    done = fresh(
        *("tune", "lora", "-m", "tiny", "--data", chats, "-o", "x", "-s", "train.max_steps=60"),
        *("-s", "train.learning_rate=1e30", "-s", "train.max_grad_norm=1e30"),
        *("-s", "train.save_steps=1", "-s", "train.warmup_steps=0"),
    )
    assert done.returncode == 5, done.stderr
    assert "not a number at step" in done.stderr and done.stdout == ""
    assert not (tmp_path / "x").exists()
    said = re.search(r"last good checkpoint is (\S+)", done.stderr)
    assert said is not None, done.stderr
    with safe_open(Path(said[1]) / "learned.safetensors", framework="pt") as stream:
        tensors = [stream.get_tensor(name) for name in stream.keys()]  # noqa: SIM118
    assert tensors
    assert all(t.isfinite().all() for t in tensors)


def test_force_trains_from_the_start_and_resume_does_not(
    start: Callable[..., Popen], fresh: Run, tiny: Path, chats: Path, home: Path
) -> None:
    words = ("tune", "lora", "-m", "tiny", "--data", chats, "-o", "x", "--json")
    words = (*words, "-s", "train.max_steps=60", "-s", "train.save_steps=3")
    process = start(*words)
    until(lambda: list((home / "work").glob("*/checkpoint-*/bmkit-whole")))
    process.kill()
    process.communicate()
    again = fresh(*words, "--force")
    assert again.returncode == 0, again.stderr
    assert "going on from step" not in again.stderr
    assert not any((home / "work").iterdir())


def test_two_trainings_of_the_same_key_do_not_share_their_checkpoints(
    start: Callable[..., Popen], fresh: Run, tiny: Path, chats: Path, home: Path
) -> None:
    words = ("tune", "lora", "-m", "tiny", "--data", chats, "-s", "train.max_steps=150")
    first = start(*words, "-o", "x")
    until(lambda: list((home / "work").glob("*/checkpoint-*")))
    second = fresh(*words, "-o", "y")  # another place, the same work folder
    assert second.returncode == 3 and "another bmkit" in second.stderr, second.stderr
    assert "the same lora" in second.stderr and "name another" not in second.stderr
    out, err = first.communicate(timeout=120)
    assert (first.returncode, out) == (0, "x\n"), err


def test_launchers_variables_change_nothing(fresh: Run, tiny: Path, chats: Path) -> None:
    words = ("tune", "lora", "-m", "tiny", "--data", chats, "--json", "-s", "train.max_steps=5")
    plain = json.loads(fresh(*words, "-o", "x").stdout)
    foreign = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_CPU": "false",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
    }
    other = fresh(*words, "-o", "y", **foreign)
    assert other.returncode == 0, other.stderr
    assert json.loads(other.stdout)["digest"] == plain["digest"]


@pytest.mark.parametrize("delay", [0.6, 2.0, 5.0])
def test_an_impatient_user_who_stops_twice_gets_130_and_one_line(
    start: Callable[..., Popen], tiny: Path, chats: Path, tmp_path: Path, delay: float
) -> None:
    process = start(
        *("tune", "lora", "-m", "tiny", "--data", chats, "-o", "x", "--progress", "none"),
        *("-s", "train.max_steps=500"),
    )
    time.sleep(delay)
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    (said,) = [x for x in err.splitlines() if "going on" not in x]
    assert said.startswith("error: stopped; ")
    assert not list(tmp_path.glob(".x*"))


def test_a_stop_inside_generated_code_ends_with_130(fresh: Run, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'yaml':\n"  # as dataclasses and namedtuple do while modules load
        "            exec('import os; os.kill(os.getpid(), 2)\\nfor _ in range(10**6): pass')\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = fresh("show", "int8", PYTHONPATH=path)
    assert done.returncode == 130, (done.returncode, done.stderr)
    assert done.stderr == "error: stopped; nothing half-written is left\n"
