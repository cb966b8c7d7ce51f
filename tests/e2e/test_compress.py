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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    T5Config,
)

Run = Callable[..., subprocess.CompletedProcess[str]]
Words = tuple[str, ...]
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


def test_what_does_not_fit_is_measured_by_streaming(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    whole = metrics(bmkit("compress", "wanda", "-m", "tiny", "-o", "w", *SHORT))
    done = bmkit("compress", "wanda", "-m", "tiny", "-o", "s", *SHORT, "--cpu-memory", "200MiB")
    streamed = metrics(done)
    assert "streamed" in done.stderr
    assert streamed["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-3)
    assert "decode" in whole and "decode" not in streamed


@pytest.mark.parametrize("recipe", ["int4", "magnitude"])
@pytest.mark.parametrize(
    ("name", "said"),
    [("model.norm.weight", "NaN"), ("model.embed_tokens.weight", "NaN"), ("shape", "config wants")],
)
def test_what_no_one_could_open_is_refused_unmeasured(
    bmkit: Run, tiny: Path, recipe: str, name: str, said: str
) -> None:
    weights = load_file(tiny / "model.safetensors")
    if name == "shape":
        name = "model.layers.0.mlp.up_proj.weight"
        weights[name] = weights[name][:-1].clone()
    else:
        weights[name].view(-1)[3] = float("nan")
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    done = bmkit("compress", recipe, "-m", "tiny", "-o", "x", "-s", "measure_speed=false")
    assert done.returncode == 3 and said in done.stderr and name in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe\x80\x81" * 99, "UTF-8"), (b" \n\t\n" * 99, "nothing"), (b"", "nothing")],
    ids=["binary", "blank", "empty"],
)
def test_a_file_that_is_no_text_is_refused(
    bmkit: Run, home: Path, tiny: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    done = bmkit("compress", "wanda", "-m", "tiny", "-o", "x", *SHORT)
    assert done.returncode == 3 and said in done.stderr, done.stderr
    assert (home / "work").is_dir() and not any((home / "work").iterdir())


def test_where_all_is_fitted_to_no_perplexity_is_told(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("A fox runs over the hill and looks at the sea.")
    for recipe, told in (("wanda", False), ("int8", True)):
        done = bmkit("compress", recipe, "-m", "tiny", "-o", recipe, *SHORT)
        assert ("perplexity" in metrics(done)) == told


def test_a_plan_refuses_what_headers_tell(bmkit: Run, tiny: Path, text: Path) -> None:
    long = ("-s", "data.sequence_length=100000")
    done = bmkit("compress", "gptq", "-m", "tiny", "-o", "x", *SHORT, *long, "--plan")
    assert done.returncode == 0, done.stderr
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "small").returncode == 0
    done = bmkit("compress", "int8", "-m", "small", "-o", "y", "--plan")
    assert done.returncode == 3 and "quantised already" in done.stderr
    every = ",".join(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
    done = bmkit(
        "compress", "int8", "-m", "tiny", "-o", "y", "-s", f"steps.0.exclude_modules=[{every}]"
    )
    assert done.returncode == 2 and "leaves no layer" in done.stderr


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


def test_sizes_are_moved_between_values_and_output_of_an_encoder(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=400, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "bert")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, tmp_path / "bert" / file)
    recipe = tmp_path / "awq.yaml"
    recipe.write_text(
        "kind: compress\nsteps:\n  - method: awq\n  - method: quantize\n    bits: 4\n"
        "    group_size: 32\n"
    )
    found = metrics(bmkit("compress", recipe, "-m", "bert", "-o", "x", *SHORT))
    assert found["places"] == model.config.num_hidden_layers
    assert found["error_left"] < 1


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
    ("recipe", "more", "figure"),
    [
        ("gptq", (), "fallbacks"),
        ("gptq", ("-s", "steps.0.average_bits=5"), "fallbacks"),
        ("sparsegpt", ("-s", "steps.0.pattern=2:4"), "sparsity"),
        ("w8a8", ("-s", "steps.0.activations=static"), "weight_error"),
        ("awq", (), "error_left"),
        ("smoothquant", (), "places"),
    ],
)
def test_both_halves_of_an_encoder_decoder_are_compressed(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path, recipe: str, more: Words, figure: str
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=400, **sizes, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, tmp_path / "t5" / file)
    found = metrics(bmkit("compress", recipe, "-m", "t5", "-o", "x", *more, *SHORT))
    assert figure in found and found["layers"] == 2 * (6 + 10)
    assert 0.8 < found["perplexity_ratio"] < 1.3
    assert found["perplexity_ratio"] != 1
    answer = bmkit("infer", "-m", "x", "-p", "Hi", "--max-new-tokens", "5")
    assert answer.returncode == 0, answer.stderr
    if "steps.0.average_bits=5" in more:  # a layout of ours
        return
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 77, 30, 8]])
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, decoder_input_ids=ids[:, :2]).logits).all()


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


@pytest.mark.parametrize("rounding", ["quantize", "gptq"])
def test_two_of_four_is_really_small_and_says_the_same(
    bmkit: Run, tiny: Path, tmp_path: Path, rounding: str
) -> None:
    """The packed layout and the one with zeros are the same model, in three bits and in four."""
    (tmp_path / "text.txt").write_text("some words to look at, and others too. " * 80)
    recipe = """
kind: compress
data: {calibration: text.txt, sequence_length: 64}
steps:
  - {method: sparsegpt, pattern: "2:4"}
  - {method: %s, bits: 4, group_size: 32, symmetric: false, layout: %s}
"""
    sizes, said = [], []
    for layout in ("dense-zeros", "packed"):
        (tmp_path / f"{layout}.yaml").write_text(recipe % (rounding, layout))
        done = bmkit("compress", f"{layout}.yaml", "-m", "tiny", "-o", layout, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["metrics"]
        sizes.append(found["bytes_after"])
        for more in ([], ["--cpu-memory", "600MiB"], ["--device", "cpu", "--quant", "int8"]):
            asked = bmkit("infer", "-m", layout, "-p", "a word", "--raw", "--json", *more)
            assert asked.returncode == 0, asked.stderr
            said.append(json.loads(asked.stdout)["token_ids"])
        assert 0.4 < found["nonzeros"] / found["parameters"] < 0.7
    assert said[:3] == said[3:]
    assert sizes[1] < 0.85 * sizes[0]
    manifest = json.loads((tmp_path / "packed" / "bmkit.json").read_text())
    assert manifest["loads_in"] == ["bmkit"]
    again = bmkit("tune", "lora", "-m", "packed", "-o", "d", "-s", "train.max_steps=1")
    assert again.returncode == 0, again.stderr


def test_a_packed_layout_without_pruning_is_refused(bmkit: Run, tiny: Path) -> None:
    done = bmkit("compress", "int4", "-m", "tiny", "-o", "a", "-s", "steps.0.layout=packed")
    assert done.returncode == 2
    assert "2:4" in done.stderr
    words = ("-s", "steps.0.layout=packed", "-s", "steps.0.bits=3")
    done = bmkit("compress", "gptq", "-m", "tiny", "-o", "a", *words)
    assert done.returncode == 2 and "4 or 8 bits" in done.stderr


def test_rows_of_prompts_alone_are_not_answered_to_measure(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n' * 20)
    words = ("-s", "data.calibration=p.jsonl", "--json")
    found = metrics(bmkit("compress", "int8", "-m", "tiny", "-o", "a", *words))
    assert "perplexity" not in found
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi", "completion": "Hello to you"}\n' * 20)
    found = metrics(bmkit("compress", "int8", "-m", "tiny", "-o", "b", *words))
    assert found["perplexity"] > 0


def test_the_combined_recipe_makes_one_small_model(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words to look at, and others too. " * 80)
    done = bmkit(
        *("compress", "cook", "-m", "tiny", "-o", "a", "--json", "-s", "data.tokens=1500"),
        *("-s", "data.calibration=text.txt", "-s", "data.sequence_length=64"),
        *("-s", "steps.1.train.max_steps=3"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["metrics"]
    assert found["disk_ratio"] < 0.5
    assert found["perplexity_ratio"] > 0
    manifest = json.loads((tmp_path / "a" / "bmkit.json").read_text())
    assert [line["step"] for line in manifest["table"]] == [
        *("before", "sparsegpt", "distill", "gptq")
    ]
    sparse, distilled, rounded = (line["nonzeros"] for line in manifest["table"][1:])
    assert abs(distilled - sparse) < 0.01 * sparse, "zeros stay while it learns"
    assert rounded <= 1.01 * distilled
    shown = bmkit("show", "a")
    assert "decode tok/s" in shown.stdout
    assert bmkit("infer", "-m", "a", "-p", "a", "--raw").returncode == 0
