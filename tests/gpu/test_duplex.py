"""Duplex models on CUDA: their decisions and words are the CPU's, and they are trained there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bmkit.data.slices import stored
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.stored import Stored
from bmkit.data.slices.transcript import Label, Said, Transcript

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SAID = tuple(Said(4000 * i, 4000 * i + 1500, f"can you tell me {i}") for i in range(12))
SMALL = ("-s", "kv.high=200", "-s", "kv.low=120")  # what was said first is forgotten


@pytest.fixture
def words(tiny: Path, tmp_path: Path) -> tuple[object, ...]:
    """The words that replay a talk with the tiny model, as if it had been trained."""
    known = Stored("idle", Layout((250,), (251,), 252, 2), agent_tokens=6, threshold=0.02)
    stored.write(tiny, known)
    said = Transcript("t", "idle", 1000, SAID, (Label(48_000, "over"),))
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(line + "\n" for line in said.lines()))
    return ("duplex", "replay", file, "-m", tiny, "--json", "-s", "dtype=float32", *SMALL)


def spoken(done: subprocess.CompletedProcess[str]) -> list[tuple[Any, ...]]:
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [(r["slice"], r["decision"], r["ids"]) for r in found if r["type"] == "agent"]


@pytest.mark.parametrize("more", [(), ("-s", "sampling.prompt_lookup_num_tokens=4")])
def test_a_replay_says_what_it_says_on_the_cpu(
    bmkit: Run, words: tuple[object, ...], more: tuple[str, ...]
) -> None:
    found = [spoken(bmkit(*words, *more, "--device", device)) for device in ("cpu", "cuda")]
    assert found[0] == found[1] and len(found[0]) > 40
    assert {decision for _, decision, _ in found[0]} == {"speak", "listen"}


def test_seeded_draws_on_the_gpu_repeat(bmkit: Run, words: tuple[object, ...]) -> None:
    drawn = (*words, "--device", "cuda", "-s", "sampling.temperature=1")
    found = [spoken(bmkit(*drawn, "--seed", seed)) for seed in ("3", "3", "4")]
    assert found[0] == found[1] != found[2]


def test_it_is_trained_on_the_gpu_as_on_the_cpu(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    slices = [
        {"u": "so", "a": None, "tag": "mid"},
        {"u": "b?", "a": "yes it is", "tag": "end"},
        {"u": None, "a": " so.", "tag": "cont"},
        {"u": None, "a": None, "tag": "quiet"},
    ]
    rows = [{"id": str(i), "kind": "basic", "lang": "en", "slices": slices} for i in range(16)]
    for name in ("train", "dev", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("tune", "duplex", "-m", tiny, "--data", data, "--json", "-s", "data.own_words=0")
    words = (*words, "-s", "train.max_steps=4", "-s", "dtype=float32", "-s", "train.eval_steps=4")
    found = []
    for device in ("cpu", "cuda"):
        done = bmkit(*words, "-o", device, "--device", device)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["metrics"]["train_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
