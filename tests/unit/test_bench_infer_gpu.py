"""The GPU benchmark on the CPU: it can be run nowhere else before there is a GPU."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("infer_gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_4() -> None:
    command = [sys.executable, str(BENCH / "infer_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "torch can use no device `cuda` here" in done.stderr
    assert done.stdout == ""


def test_both_engines_answer_under_a_budget_and_bmkit_streams(bench: Any, tmp_path: Path) -> None:
    bench.make(tmp_path, "tiny")
    found = bench.streamed("cpu", tmp_path, 1, 0.0, 120 * 2**20, None)
    ours, theirs = found["engines"]["bmkit"], found["engines"]["accelerate"]
    assert "error" not in ours | theirs
    weights = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert 0 < ours["brought_bytes_a_token"] < weights
    assert found["times_accelerate"] == pytest.approx(
        ours["tokens_per_second"] / theirs["tokens_per_second"], abs=0.01
    )
    assert min(ours["peak_bytes"], theirs["peak_bytes"]) > 100 * 2**20


def test_an_engine_that_fails_is_a_figure_beside_the_others(bench: Any, tmp_path: Path) -> None:
    words = {"engine": "transformers", "path": str(tmp_path), "prompt": 1, "tokens": 1}
    engines, found = bench.measure("cpu", {"gone": words}, 1, 0.0)
    assert found["gone"]["error"].startswith("exit code 1: ")
    assert engines["gone"].times(engines["gone"]) is None
