"""The CUDA paths, against the CPU's. Run where there is a GPU: scripts/test tests/gpu."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_compress_on_the_gpu_writes_the_cpus_bytes(bmkit: Run, tiny: Path, recipe: str) -> None:
    digests = [
        json.loads(
            bmkit("compress", recipe, "-m", "tiny", "-o", d, "--device", d, "--json").stdout
        )["digest"]
        for d in ("cpu", "cuda")
    ]
    assert digests[0] == digests[1]


def test_greedy_float32_answers_are_the_cpus(
    bmkit: Run, tiny: Path, rows: Callable[..., Path]
) -> None:
    file = rows("p.jsonl", *({"prompt": p} for p in ("Hi", "Tell me a story.", "1 2 3")))
    words = ("infer", "-m", "tiny", "-i", file, "--json", "--max-new-tokens", "12")
    found = [
        [json.loads(x)["token_ids"] for x in bmkit(*words, "--device", d, *f32).stdout.splitlines()]
        for f32 in [("-s", "dtype=float32")]
        for d in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


def test_seeded_draws_on_the_gpu_repeat(bmkit: Run, tiny: Path) -> None:
    words = ("infer", "sample", "-m", "tiny", "-p", "Hi", "--json", "--device", "cuda")
    found = [json.loads(bmkit(*words, "--seed", "3").stdout)["token_ids"] for _ in range(2)]
    assert found[0] == found[1]


def test_the_report_holds_the_gpus_peak(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("infer", "-m", "tiny", "-p", "Hi", "--device", "cuda", "--report", "r.json")
    assert bmkit(*words).returncode == 0
    assert json.loads((tmp_path / "r.json").read_text())["peak_gpu_bytes"] > 0


def test_tuning_on_the_gpu_learns_and_its_delta_answers_on_the_cpu(
    bmkit: Run, tiny: Path, chats: Path
) -> None:
    done = bmkit(
        *("tune", "lora", "-m", "tiny", "--data", chats, "-o", "d", "--device", "cuda", "--json"),
        *("-s", "data.dev=chats.jsonl", "-s", "train.max_steps=30"),
        *("-s", "train.learning_rate=0.01"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["dev_loss"] < metrics["dev_loss_before"]
    answer = bmkit("infer", "-m", "d", "-p", "Say 1.", "--device", "cpu", "--max-new-tokens", "4")
    assert answer.returncode == 0, answer.stderr
