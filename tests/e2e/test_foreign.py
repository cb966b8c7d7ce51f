"""Other libraries' rounding through the command line: what they write is run here, or refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config

Run = Callable[..., subprocess.CompletedProcess[str]]
WORDS = "The sea is wide. A fox runs over the hill, 1 2 3, and the list goes on. " * 60
SHORT = ("-s", "data.tokens=1000", "-s", "data.sequence_length=64", "--json")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(WORDS)
    return path


def metrics(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["metrics"])


@pytest.mark.parametrize(
    ("words", "ratio", "share"),
    [
        (["weights=int8"], 1.05, 0.26),
        (["weights=float8"], 1.1, 0.26),
        (["weights=int4"], 1.6, 0.2),
        (["weights=int4", "optimizer=hqq"], 1.6, 0.2),
        (["weights=int8", "activations=float8"], 1.2, 0.26),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_quanto_rounds_and_infer_reads_it(
    bmkit: Run, tiny: Path, text: Path, words: list[str], ratio: float, share: float
) -> None:
    more = [part for word in words for part in ("-s", f"steps.0.{word}")]
    given = (*SHORT, "-s", "data.calibration=texts.txt", *more)
    found = metrics(bmkit("compress", "quanto", "-m", "tiny", "-o", "q", *given))
    assert found["layers"] == 14 and found["bytes_ratio"] < share * 1.3
    assert 1 / ratio < found["perplexity_ratio"] < ratio and found["perplexity_ratio"] != 1
    before, now = (AutoModelForCausalLM.from_pretrained(tiny).num_parameters(), found["parameters"])
    assert now == before
    answer = bmkit("infer", "-m", "q", "-p", "Hi", "--max-new-tokens", "5", "--json")
    assert answer.returncode == 0, answer.stderr
    for refused in (
        bmkit("compress", "int8", "-m", "q", "-o", "x"),
        bmkit("tune", "lora", "-m", "q", "--data", "texts.txt", "-o", "x"),
    ):
        assert refused.returncode == 3
        assert "quantised" in refused.stderr
    if "activations=float8" not in words:  # transformers would draw what it doesn't find
        with pytest.raises(ValueError):
            AutoModelForCausalLM.from_pretrained(tiny.parent / "q")


def test_both_halves_of_an_encoder_decoder_and_an_encoder_are_rounded_by_quanto(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path, bert: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=400, **sizes, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, tmp_path / "t5" / file)
    given = (*SHORT, "-s", "data.calibration=texts.txt", "-s", "steps.0.activations=int8")
    found = metrics(bmkit("compress", "quanto", "-m", "t5", "-o", "x", *given))
    assert found["layers"] == 2 * (6 + 10) and 0.8 < found["perplexity_ratio"] < 1.3
    assert bmkit("infer", "-m", "x", "-p", "Hi", "--max-new-tokens", "5").returncode == 0
    found = metrics(bmkit("compress", "quanto", "-m", str(bert), "-o", "b", *SHORT))
    assert found["layers"] == 2 * 6 + 1  # the pooler too
    answers = [
        json.loads(bmkit("infer", "-m", m, "-p", "A fox", "--json").stdout)["embedding"]
        for m in (str(bert), "b")
    ]
    before, after = (torch.tensor(a) for a in answers)
    assert float(torch.cosine_similarity(before, after, 0)) > 0.99
    assert not torch.equal(before, after)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_weights_that_are_no_numbers_are_named_and_rows_of_zeros_taken(
    bmkit: Run, tiny: Path, text: Path, value: float
) -> None:
    whole = load_file(tiny / "model.safetensors")
    whole["model.layers.1.mlp.up_proj.weight"][3] = value
    save_file(whole, tiny / "model.safetensors", metadata={"format": "pt"})
    for weights in ("int4", "float8"):
        given = ("-s", f"steps.0.weights={weights}", *SHORT, "-s", "measure_speed=false")
        done = bmkit("compress", "quanto", "-m", "tiny", "-o", f"q-{weights}", *given)
        if value == 0:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 3 and "model.layers.1.mlp.up_proj" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["steps.0.weights=int5"], 2, "int8"),
        (["steps.0.optimizer=hqq"], 2, "float8"),
        (["steps.0.exclude_modules=[up_prj]"], 2, "up_proj"),
        (["steps.0.activations=int8", "data.calibration=gone.txt"], 3, "gone.txt"),
    ],
)
def test_what_quanto_can_not_do_is_refused(
    bmkit: Run, tiny: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    more = [part for word in words for part in ("-s", word)]
    done = bmkit("compress", "quanto", "-m", "tiny", "-o", "x", *more)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="it is installed")
def test_a_step_of_a_library_that_is_not_there_is_refused_at_once(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    for more in ((), ("--plan",)):
        done = bmkit("compress", "optimum-gptq", "-m", "tiny", "-o", "x", *more)
        assert done.returncode == 4, done.stderr
        assert "gptqmodel" in done.stderr and "bmkit[gptq]" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("more", [(), ("steps.0.bits=3", "steps.0.symmetric=false")])
def test_optimums_gptq_rounds_and_infer_reads_it(
    bmkit: Run, tiny: Path, text: Path, more: tuple[str, ...]
) -> None:
    pytest.importorskip("gptqmodel")
    words = [part for word in more for part in ("-s", word)]
    given = (*SHORT, "-s", "data.calibration=texts.txt", *words)
    narrow = bmkit("compress", "optimum-gptq", "-m", "tiny", "-o", "q", *given)
    assert narrow.returncode == 2 and "k_proj" in narrow.stderr
    given = (*given, "-s", "steps.0.exclude_modules=[k_proj,v_proj]")
    found = metrics(bmkit("compress", "optimum-gptq", "-m", "tiny", "-o", "q", *given))
    assert found["layers"] == 10 and 0.5 < found["perplexity_ratio"] < 2
    assert bmkit("infer", "-m", "q", "-p", "Hi", "--max-new-tokens", "5").returncode == 0
    assert isinstance(AutoModel.from_pretrained(tiny.parent / "q"), torch.nn.Module)
