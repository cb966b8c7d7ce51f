"""`bmkit compress` on text: what comes out loads elsewhere, and what can't be done is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

Run = Callable[..., subprocess.CompletedProcess[str]]
WORDS = "The sea is wide. A fox runs over the hill, 1 2 3, and the list goes on. " * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(WORDS)
    return path


def metrics(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["metrics"])


SHORT = ("-s", "data.calibration=texts.txt", "-s", "data.tokens=2000", "--json")
SHORT = (*SHORT, "-s", "data.sequence_length=64")


def test_gptq_tells_its_perplexity_and_loads_in_transformers(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    found = metrics(bmkit("compress", "gptq", "-m", "tiny", "-o", "g", *SHORT))
    plain = metrics(bmkit("compress", "int4", "-m", "tiny", "-o", "p", *SHORT))
    assert found["perplexity_before"] == plain["perplexity_before"]
    assert found["perplexity"] != plain["perplexity"]
    assert found["bytes_ratio"] < 0.2 and found["layers"] == 14
    assert found["perplexity_ratio"] == pytest.approx(
        found["perplexity"] / found["perplexity_before"], rel=1e-3
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "g", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 77, 30, 8]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    assert torch.isfinite(wanted).all()
    answer = bmkit("infer", "-m", "g", "-p", "Hi", "--max-new-tokens", "5")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruned_models_have_their_zeros_and_load_everywhere(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path, method: str, pattern: str
) -> None:
    words = ("-s", f"steps.0.pattern={pattern}", *SHORT)
    found = metrics(bmkit("compress", method, "-m", "tiny", "-o", "s", *words))
    assert found["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found["perplexity"] > 0
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("tiny", "s"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if "_proj" not in name:
            assert torch.equal(tensor, before[name])
        elif pattern == "2:4":
            assert ((tensor != 0).reshape(len(tensor), -1, 4).sum(-1) <= 2).all()
        if method != "sparsegpt":
            assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])
    AutoModelForCausalLM.from_pretrained(tmp_path / "s")


def test_zeros_stay_when_a_pruned_model_is_rounded(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "kind: compress\nsteps:\n  - method: wanda\n    pattern: '2:4'\n"
        "  - method: gptq\n    bits: 8\n    group_size: channel\n"
    )
    metrics(bmkit("compress", recipe, "-m", "tiny", "-o", "b", *SHORT))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "_proj" in name:
            assert ((weight != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all(), name


def test_distillation_keeps_the_zeros_and_mends_the_rest(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "heal.yaml"
    recipe.write_text(
        "kind: compress\n"
        "steps:\n  - method: magnitude\n    pattern: '2:4'\n"
        "  - method: distill\n    train: {max_steps: 30, learning_rate: 0.003, weight_decay: 0.1}\n"
    )
    found = metrics(bmkit("compress", recipe, "-m", "tiny", "-o", "h", *SHORT))
    assert found["agreement"] > found["agreement_before"]
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("tiny", "h"))
    changed = 0
    for name, tensor in after.items():
        if "_proj" in name:
            assert ((tensor != 0).reshape(len(tensor), -1, 4).sum(-1) <= 2).all()
            changed += int((tensor != before[name])[tensor != 0].sum())
    assert changed > 1000


def test_an_encoder_is_compressed_on_text_that_is_given(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, tmp_path / "bert" / file)
    refused = bmkit("compress", "wanda", "-m", "bert", "-o", "x")
    assert refused.returncode == 3 and "data.calibration" in refused.stderr
    found = metrics(bmkit("compress", "wanda", "-m", "bert", "-o", "x", *SHORT))
    assert found["sparsity"] == pytest.approx(0.5, abs=0.01) and "perplexity" not in found
    AutoModelForMaskedLM.from_pretrained(tmp_path / "x")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-s", "steps.0.pattern=4:2"], 2, "n:m"),
        (["-s", "steps.0.pattern=5:7"], 3, "divide"),
        (["-s", "steps.0.sparsity=0"], 2, "sparsity"),
        (["-s", "steps.0.sparsity=1"], 2, "sparsity"),
        (["-s", "steps.0.exclude_modules=[down_prj]"], 2, "down_proj"),
        (["-s", "data.calibration=empty.txt"], 3, "nothing"),
        (["-s", "data.calibration=gone.txt"], 3, "gone.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_done_is_refused(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = bmkit("compress", "wanda", "-m", "tiny", "-o", "x", *SHORT, *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("recipe", ["gptq", "magnitude", "wanda", "sparsegpt"])
def test_a_layer_with_a_weight_that_is_no_number_is_named(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path, recipe: str
) -> None:
    whole = load_file(tiny / "model.safetensors")
    whole["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(whole, tiny / "model.safetensors", metadata={"format": "pt"})
    done = bmkit("compress", recipe, "-m", "tiny", "-o", "x", *SHORT)
    assert done.returncode == 3
    assert "model.layers.1.mlp.up_proj" in done.stderr


def test_few_tokens_are_told(bmkit: Run, tiny: Path, text: Path) -> None:
    done = bmkit("compress", "wanda", "-m", "tiny", "-o", "x", *SHORT, "-s", "data.tokens=100")
    assert done.returncode == 0 and "are few" in done.stderr
