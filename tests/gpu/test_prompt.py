"""Prompts on CUDA: labels and probabilities are the CPU's, and soft tokens are learned there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS = ("a good film", "the bad film was long", "so long", "one of the best of the year, by far")
ROWS = [{"text": TEXTS[i % 4], "label": ("positive", "negative")[i % 2]} for i in range(24)]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe that tells labels, JSON being YAML, and its rows beside it."""

    def write(template: str, **more: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        data = {"test": "rows.jsonl", "columns": {"text_a": "text", "label": "label"}}
        data |= {"labels": ["negative", "positive"]}  # type: ignore[dict-item]
        data |= {"train": "rows.jsonl", "dev": "rows.jsonl"} if "train" in more else {}
        words = {"negative": ["bad", "terrible"], "positive": ["good"]}
        values = {
            "kind": "prompt",
            "data": data,
            "template": {"text": template},
            "verbalizer": {"label_words": words, "multi_token_handler": "mean"},
            **more,
        }
        path = tmp_path / f"recipe-{len(list(tmp_path.glob('recipe-*')))}.yaml"
        path.write_text(json.dumps(values))
        return path

    return write


def told(bmkit: Run, path: Path, device: str) -> dict[str, Any]:
    words = ("prompt", path, "-m", "tiny", "--device", device, "-o", device, "--json")
    done = bmkit(*words, "-s", "dtype=float32")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["metrics"])


def test_labels_on_the_gpu_are_the_cpus(
    bmkit: Run, tiny: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    file = recipe('{"placeholder": "text_a"} It was {"mask"}')
    here, there = (told(bmkit, file, device) for device in ("cpu", "cuda"))
    assert here["accuracy"] == there["accuracy"]
    rows = [
        [json.loads(line) for line in answers.stdout.splitlines()]
        for device in ("cpu", "cuda")
        for answers in [
            bmkit(
                *("infer", "-m", "cpu", "-p", TEXTS[0], "-p", TEXTS[1], "--json"),
                *("--device", device, "-s", "dtype=float32"),
            )
        ]
    ]
    assert len(rows[0]) == 2
    for mine, theirs in zip(*rows, strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


@pytest.mark.parametrize(
    "tune", [{"mode": "soft"}, {"mode": "delta", "deltas": [{"type": "lora", "r": 4}]}]
)
def test_soft_tokens_are_learned_on_the_gpu_as_on_the_cpu(
    bmkit: Run, tiny: Path, recipe: Callable[..., Path], tune: dict[str, Any]
) -> None:
    train = {"learning_rate": 0.02, "max_steps": 6, "per_device_train_batch_size": 8}
    train |= {"eval_steps": 3, "load_best_model_at_end": True}
    file = recipe(
        '{"soft": "It"} {"placeholder": "text_a"} {"soft": None, "duplicate": 2} {"mask"}',
        train=train,
        tune=tune,
        learning_setting={"type": "full"},
    )
    here, there = (told(bmkit, file, device) for device in ("cpu", "cuda"))
    assert there["train_loss"] == pytest.approx(here["train_loss"], rel=2e-3)
