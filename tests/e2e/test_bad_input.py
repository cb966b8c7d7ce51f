"""What users get wrong: one clear error, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def refused(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def test_typos_in_file_and_set_are_all_named_at_once(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        "kind: tune\ndeltas:\n  - type: lora\n    lora_alfa: 3\ndata: {trian: x}\n"
    )
    done = bmkit("tune", "r.yaml", "-m", "tiny", "-o", "x", "-s", "train.learning_rat=1")
    refused(
        done, 2, "r.yaml:4:5", "`lora_alpha`", "r.yaml:5:8", "`train`", "--set", "`learning_rate`"
    )
    assert not (tmp_path / "x").exists()


def test_a_recipe_of_another_kind(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    assert bmkit("cp", "tune/lora", "lora.yaml").returncode == 0
    refused(bmkit("compress", "lora.yaml", "-m", "tiny", "-o", "x"), 2, "bmkit tune")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", ["no model.safetensors"]),
        ("truncated", ["truncated"]),
        ("foreign", ["not a safetensors file"]),
        ("pickle", ["pickle"]),
        ("no config", ["no config.json"]),
        ("bad config", ["config.json", "not JSON"]),
        ("nan", ["NaN", "q_proj"]),
    ],
)
def test_a_damaged_checkpoint(
    bmkit: Run, tiny: Path, tmp_path: Path, damage: str, words: list[str]
) -> None:
    weights = tiny / "model.safetensors"
    if damage in {"missing", "pickle"}:
        weights.unlink()
    if damage == "pickle":
        (tiny / "pytorch_model.bin").write_bytes(b"x")
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "foreign":
        weights.write_bytes(b"<html>not found</html>" * 100)
    if damage == "no config":
        (tiny / "config.json").unlink()
    if damage == "bad config":
        (tiny / "config.json").write_text("{")
    if damage == "nan":
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    refused(bmkit("compress", "int8", "-m", "tiny", "-o", "x"), 3, *words)
    assert not (tmp_path / "x").exists()


def test_weights_that_do_not_fit_the_config(bmkit: Run, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused(bmkit("infer", "-m", "tiny", "-p", "x"), 3, "missing")


def test_an_unknown_architecture(bmkit: Run, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    refused(bmkit("infer", "-m", "tiny", "-p", "x"), 3, "config.json")


def test_a_missing_tokenizer(bmkit: Run, tiny: Path) -> None:
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    refused(bmkit("infer", "-m", "tiny", "-p", "x"), 3, "no tokenizer")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["holds no rows"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["d.jsonl:2", "not JSON"]),
        ('{"prompt": "a"}\n', ["d.jsonl:1", "completion"]),
        ('{"messages": [{"role": "usr", "content": "a"}]}\n', ["d.jsonl:1", "`user`"]),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ["d.jsonl:1", "assistant"]),
        ("[1]\n", ["d.jsonl:1", "object"]),
        ('{"txt": "a"}\n', ["d.jsonl:1", "`text`"]),
    ],
)
def test_training_rows_that_can_not_be_used(
    bmkit: Run, tiny: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    refused(bmkit("tune", "lora", "-m", "tiny", "--data", "d.jsonl", "-o", "x"), 3, *words)
    assert not (tmp_path / "x").exists()


def test_a_data_file_that_is_not_there(bmkit: Run, tiny: Path) -> None:
    refused(bmkit("tune", "lora", "-m", "tiny", "--data", "no.jsonl", "-o", "x"), 3, "no.jsonl")


def test_a_target_that_matches_nothing_names_the_nearest(bmkit: Run, tiny: Path) -> None:
    done = bmkit(
        *("tune", "lora", "-m", "tiny", "-o", "x"), "-s", "deltas.0.target_modules=[q_porj]"
    )
    refused(done, 2, "`q_porj`", "`q_proj`")


@pytest.fixture
def delta(bmkit: Run, tiny: Path, chats: Path, tmp_path: Path) -> Path:
    more = ("-s", "train.max_steps=1")
    assert bmkit("tune", "lora", "-m", "tiny", "--data", chats, "-o", "d", *more).returncode == 0
    return tmp_path / "d"


def test_a_delta_whose_base_is_gone_or_changed(bmkit: Run, delta: Path, tiny: Path) -> None:
    tiny.rename(tiny.with_name("elsewhere"))
    refused(bmkit("infer", "-m", "d", "-p", "x"), 3, "is gone", "-m BASE --adapter d")
    answer = bmkit("infer", "-m", "elsewhere", "--adapter", "d", "-p", "x", "--max-new-tokens", "2")
    assert answer.returncode == 0, answer.stderr
    shutil.copytree(tiny.with_name("elsewhere"), tiny)
    config = json.loads((tiny / "generation_config.json").read_text())
    (tiny / "generation_config.json").write_text(json.dumps(config | {"top_k": 3}))
    refused(bmkit("infer", "-m", "d", "-p", "x"), 3, "has changed", "-m BASE --adapter d")


def test_a_moved_base_in_the_cache_is_found_by_its_content(
    bmkit: Run, delta: Path, tiny: Path
) -> None:
    pulled = bmkit("pull", "tiny")
    assert pulled.returncode == 0, pulled.stderr
    shutil.rmtree(tiny)
    done = bmkit("infer", "-m", "d", "-p", "x", "--max-new-tokens", "2", "--json")
    assert done.returncode == 0, done.stderr


def test_a_delta_is_not_a_model_to_compress(bmkit: Run, delta: Path) -> None:
    refused(bmkit("compress", "int8", "-m", "d", "-o", "x"), 3, "is a delta", "merge")


def test_out_that_holds_something_else_is_left_alone(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for more in ((), ("--force",)):
        refused(bmkit("compress", "int8", "-m", "tiny", "-o", "mine", *more), 3, "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_out_of_another_recipe_is_replaced_only_by_force(bmkit: Run, tiny: Path) -> None:
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "a").returncode == 0
    refused(bmkit("compress", "int4", "-m", "tiny", "-o", "a"), 3, "another recipe", "--force")
    assert bmkit("compress", "int4", "-m", "tiny", "-o", "a", "--force").returncode == 0
    refused(bmkit("compress", "int8", "-m", "tiny", "-o", "tiny", "--force"), 3, "tiny")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_seen_before_starting(bmkit: Run, tiny: Path, small_disk: Path) -> None:
    refused(bmkit("compress", "int8", "-m", "tiny", "-o", small_disk / "x"), 4, "disk")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_while_writing(
    bmkit: Run, sh: Callable[[str], Done], tiny: Path, tmp_path: Path
) -> None:
    done = sh("ulimit -f 16; bmkit compress int8 -m tiny -o x -q")
    refused(done, 4)
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))


def test_a_disk_that_fills_up_in_any_stage(
    sh: Callable[[str], Done], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    small = "ulimit -f 16; export TMPDIR=/dev/shm; "
    tune = f"bmkit tune lora -m tiny --data {chats} -o x -q -s train.num_train_epochs=1"
    refused(sh(small + tune + " -s train.save_steps=1"), 4, "bmkit-home/work", "BMKIT_HOME")
    refused(sh(small + tune + " -s deltas.0.r=16 -s train.save_steps=1000"), 4, "cannot write")
    refused(sh(small + "bmkit pull ./tiny -o x"), 4, "cannot write")
    many = " ".join(f"-p word{i}" for i in range(40))
    infer = f"bmkit infer -m tiny --max-new-tokens 40 {many} -q"
    refused(sh("ulimit -f 1; " + infer + " -o x.jsonl"), 4, "x.jsonl", "too large")
    left = {".x.jsonl.partial", ".x.jsonl.partial-key"}  # rows that are done are kept
    assert {p.name for p in tmp_path.iterdir()} - left == {*before, "bmkit-home"}
    again = sh(infer + " -o x.jsonl --json")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "x.jsonl").read_text().count("\n") == 40
    assert not any((tmp_path / name).exists() for name in left)


def test_a_report_or_copy_that_can_not_be_written(sh: Callable[[str], Done], tiny: Path) -> None:
    done = sh("ulimit -f 0; bmkit cp tune/lora x.yaml")
    refused(done, 4, "x.yaml")
    done = sh("bmkit infer -m tiny -p x -q --max-new-tokens 2 --report /dev/full")
    assert done.returncode == 4
    assert "/dev/full" in done.stderr
    refused(sh("bmkit ls > /dev/full"), 4, "stdout", "space")
    refused(sh("bmkit infer -m tiny -p x -q --max-new-tokens 2 > /dev/full"), 4, "stdout")


def test_a_place_that_can_not_be_written(bmkit: Run, tiny: Path) -> None:
    refused(bmkit("compress", "int8", "-m", "tiny", "-o", "/proc/x"), 4, "/proc")


def test_no_such_device(bmkit: Run, tiny: Path) -> None:
    refused(bmkit("infer", "-m", "tiny", "-p", "x", "--device", "cuda:9"), 4, "cuda:9")
    refused(bmkit("infer", "-m", "tiny", "-p", "x", "--device", "gpu"), 2, "gpu")


def test_a_budget_that_is_too_small_names_the_smallest(bmkit: Run, tiny: Path) -> None:
    done = bmkit("compress", "int8", "-m", "tiny", "-o", "x", "--cpu-memory", "10KiB")
    refused(done, 4, "--cpu-memory", "smallest")
    refused(bmkit("compress", "int8", "-m", "tiny", "-o", "x", "--cpu-memory", "6 gigs"), 2, "6GiB")


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "-", "-m", "-"],
        ["tune", "-", "-m", "-"],
        ["infer", "-", "-m", "tiny", "-i", "-"],
        ["infer", "-m", "-", "-i", "-"],
    ],
)
def test_stdin_can_be_one_thing_only(bmkit: Run, tiny: Path, words: list[str]) -> None:
    refused(bmkit(*words, stdin="x"), 2, "stdin")


def test_a_recipe_from_stdin_is_told_its_lines(bmkit: Run, tiny: Path) -> None:
    text = "kind: compress\nsteps:\n  - method: quantize\n    bitts: 4\nseed: 1\nseed: 2\n"
    done = bmkit("compress", "-", "-m", "tiny", stdin=text)
    refused(done, 2, "<stdin>:4:5", "did you mean `bits`", "<stdin>:6:1", "2 problems")


def test_a_hub_id_offline(bmkit: Run) -> None:
    refused(bmkit("pull", "owner/name"), 3, "hub", "offline")
    refused(bmkit("infer", "-m", "owner/name", "-p", "x"), 3, "hub")


def test_a_misspelt_model(bmkit: Run) -> None:
    refused(bmkit("pull", "smollm2-135"), 3, "smollm2-135m")


def test_a_gguf_file_that_is_none(bmkit: Run, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not one")
    refused(bmkit("pull", "x.gguf"), 3, "not a GGUF")
    (tmp_path / "y.gguf").write_bytes(b"GGUF\x03\0\0\0")
    refused(bmkit("pull", "y.gguf"), 3, "y.gguf")


def test_bad_rows_are_named_and_the_others_answered(bmkit: Run, tiny: Path) -> None:
    text = '{"prompt": "a"}\n{"prompt": \n{"promt": "b"}\n{"prompt": "c", "id": "z"}\n'
    done = bmkit(*("infer", "-m", "tiny", "-i", "-", "--json", "--max-new-tokens", "2"), stdin=text)
    assert done.returncode == 3
    assert [json.loads(x)["id"] for x in done.stdout.splitlines()] == [0, "z"]
    assert "-:2" in done.stderr and "-:3" in done.stderr and "`prompt`" in done.stderr


def test_prompts_that_can_not_be_answered(
    bmkit: Run, tiny: Path, rows: Callable[..., Path]
) -> None:
    rows("p.jsonl", {"prompt": "x" * 600}, {"prompt": "short"})
    done = bmkit("infer", "-m", "tiny", "-i", "p.jsonl", "--json", "--max-new-tokens", "2")
    assert done.returncode == 3 and "p.jsonl:1" in done.stderr and "512" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    refused(bmkit("infer", "-m", "tiny", "-p", "", "--raw"), 3, "empty")
    (tiny.parent / "none.jsonl").write_text("\n")
    refused(bmkit("infer", "-m", "tiny", "-i", "none.jsonl"), 3, "no rows")


@pytest.mark.parametrize(
    "words",
    [
        ["infer", "-m", "tiny"],
        ["infer", "-m", "tiny", "-p", "x", "-i", "y"],
        ["infer", "-m", "-", "-i", "-"],
        ["infer", "-m", "tiny", "-p", "x", "-s", "temperature=hot"],
        ["infer", "-m", "tiny", "-p", "x", "-s", "do_sample=true", "-s", "temperature=0"],
        ["infer", "-m", "tiny", "-p", "x", "-q", "-v"],
        ["compress", "int8"],
        ["compress", "int8", "-m", "tiny", "--nonsense"],
        ["schema", "comprss"],
        ["ls", "tun"],
    ],
)
def test_wrong_command_lines_exit_2(bmkit: Run, tiny: Path, words: list[str]) -> None:
    refused(bmkit(*words), 2)


def test_a_manifest_that_was_tampered_with(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "a").returncode == 0
    manifest = tmp_path / "a" / "bmkit.json"
    values = json.loads(manifest.read_text())
    entry = values["files"].pop("config.json")
    values["files"]["../tiny/config.json"] = entry
    manifest.write_text(json.dumps(values))
    refused(bmkit("infer", "-m", "a", "-p", "x"), 3, "damaged")
    refused(bmkit("verify", "a"), 3, "damaged")


def test_an_artifact_whose_weights_were_changed_in_place(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "a").returncode == 0
    weights = tmp_path / "a" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    refused(bmkit("infer", "-m", "a", "-p", "x"), 3, "model.safetensors", "--force")
    refused(bmkit("verify", "a"), 3, "model.safetensors")


def test_text_that_is_no_unicode_is_a_bad_row(bmkit: Run, tiny: Path) -> None:
    done = bmkit("infer", "-m", "tiny", "-i", "-", "--json", stdin='{"prompt": "\\ud800"}\n')
    refused(done, 3, "-:1", "UTF-8")


def test_places_that_can_not_be_written_are_no_bugs(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    ask = ("infer", "-m", "tiny", "-p", "x", "--max-new-tokens", "1")
    done = bmkit(*ask, "--report", "/proc/r.json")
    assert done.returncode == 4 and "/proc" in done.stderr
    (tmp_path / "folder").mkdir()
    refused(bmkit(*ask, "-o", "folder"), 3, "folder")
    refused(bmkit("pull", "tiny", BMKIT_HOME="/proc/x"), 4, "/proc/x")


def test_closed_standard_streams_are_no_bugs(sh: Callable[[str], Done], tiny: Path) -> None:
    done = sh("bmkit compress int8 -q -m tiny -o a >&- && bmkit verify a")
    assert done.returncode == 0 and "whole" in done.stdout, done.stderr
    refused(sh("bmkit compress int8 -q -m - -o b <&-"), 3, "no path came")
