"""`bmkit compress` with `shrink` and `gates`: steps in a row, refusals, what is told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

Run = Callable[..., subprocess.CompletedProcess[str]]
WORDS = "The sea is wide. A fox runs over the hill, 1 2 3, and the list goes on. " * 60
SHORT = ("-s", "data.calibration=texts.txt", "-s", "data.tokens=1000", "--json")
SHORT = (*SHORT, "-s", "data.sequence_length=64")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(WORDS)
    return path


def recipe(path: Path, *steps: str) -> Path:
    path.write_text("kind: compress\nsteps:\n" + "".join(f"  - {{{step}}}\n" for step in steps))
    return path


def test_a_cut_model_is_healed_and_rounded(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    steps = recipe(
        tmp_path / "all.yaml",
        "method: shrink, intermediate_size: 32, num_key_value_heads: 1",
        "method: wanda, pattern: '2:4'",
        "method: distill, train: {max_steps: 5}",
        "method: quantize, bits: 8, group_size: channel",
    )
    done = bmkit("compress", steps, "-m", "tiny", "-o", "small", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "keep 1 of 2 groups of heads, 32 of 64 neurons" in done.stderr
    found = json.loads(done.stdout)["metrics"]
    assert found["parameters_ratio"] < 0.6 and found["sparsity"] >= 0.5
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "small").config
    assert (config.intermediate_size, config.num_key_value_heads) == (32, 1)
    assert (config.num_attention_heads, config.head_dim) == (2, 8)
    answer = bmkit("infer", "-m", "small", "-p", "Hi", "--max-new-tokens", "5")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("steps", "words", "code", "said"),
    [
        (("method: wanda", "method: shrink, parameters: 0.5"), [], 2, "comes before `wanda`"),
        (("method: magnitude", "method: drop_layers, keep: 1"), [], 2, "comes before `magnitude`"),
        (("method: quantize, bits: 8", "method: gates, parameters: 0.5"), [], 2, "comes last"),
        (("method: shrink",), [], 2, "either a share"),
        (("method: shrink, parameters: 0.5, intermediate_size: 32",), [], 2, "either a share"),
        (("method: shrink, intermediate_size: 32, units: [ffn]",), [], 2, "go with `parameters`"),
        (("method: shrink, parameters: 0.5, units: [fnn]",), [], 2, "ffn"),
        (("method: gates, parameters: 0.5, units: [fnn]",), [], 2, "ffn"),
        (("method: gates, hidden_size: 33",), [], 2, "has 32"),
        (("method: shrink, intermediate_size: 65",), [], 2, "has 64"),
        (("method: shrink, parameters: 0.5, multiple_of: 64",), [], 2, "can't be had"),
        (("method: shrink, num_hidden_layers: 1",), ["-s", "data.calibration=no.txt"], 3, "no.txt"),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_what_can_not_be_done_is_refused(
    bmkit: Run,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    steps: tuple[str, ...],
    words: list[str],
    code: int,
    said: str,
) -> None:
    done = bmkit("compress", recipe(tmp_path / "r.yaml", *steps), "-m", "tiny", *SHORT, *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr


def test_gates_tell_what_they_expect(bmkit: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    words = ("-s", "steps.0.train.max_steps=6", "-s", "steps.0.multiple_of=8", *SHORT)
    done = bmkit("compress", "gates", "-m", "tiny", "-o", "g", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["metrics"]
    assert 0 < found["parameters_ratio"] <= 0.8 < found["expected_ratio"] < 1  # six steps are few
    assert found["perplexity"] > 0


@pytest.mark.parametrize("method", ["shrink", "gates"])
def test_a_plan_says_what_will_be_cut(bmkit: Run, tiny: Path, method: str) -> None:
    done = bmkit("compress", method, "-m", "tiny", "--plan")
    assert done.returncode == 0, done.stderr
    assert "80% of its blocks' parameters, by ffn" in done.stderr + done.stdout


def test_few_tokens_are_told(bmkit: Run, tiny: Path, text: Path) -> None:
    words = ("-s", "steps.0.parameters=0.7", *SHORT, "-s", "data.tokens=200")
    done = bmkit("compress", "shrink", "-m", "tiny", "-o", "x", *words)
    assert done.returncode == 0 and "are few" in done.stderr, done.stderr
