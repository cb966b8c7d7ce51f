"""`bmkit compress` with steps that train: for a rounding that follows, with another teacher."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    T5Config,
)

from bmkit.compress.qat import Rounding
from bmkit.compress.run import run as compress
from bmkit.nn.rounding import Grid, round_matrix
from bmkit.pipeline import stage
from bmkit.pipeline.stage import Request
from bmkit.report import Silent

Run = Callable[..., subprocess.CompletedProcess[str]]
WORDS = "The sea is wide. A fox runs over the hill, 1 2 3, and the list goes on. " * 60
SHORT = ("-s", "data.calibration=texts.txt", "-s", "data.tokens=2000", "--json")
SHORT = (*SHORT, "-s", "data.sequence_length=64")
TRAIN = "train: {max_steps: 6, learning_rate: 0.003, per_device_train_batch_size: 4}"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(WORDS)
    return path


def metrics(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["metrics"])


def recipe(folder: Path, *steps: str) -> Path:
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text("kind: compress\nsteps:\n" + "".join(f"  - {{{s}}}\n" for s in steps))
    return path


def logits(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).reshape(2, 20)).logits


def in_float32(path: Path) -> None:
    """Let a checkpoint be one that is stored in float32."""
    whole = {k: t.float() for k, t in load_file(path / "model.safetensors").items()}
    save_file(whole, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "how",
    [
        "bits: 4, group_size: 32",
        "bits: 4, group_size: 32, scale_search: 5",
        "bits: 3, group_size: 32, symmetric: false",
        "bits: 8",
    ],
)
def test_what_is_trained_rounded_is_what_is_exported_bit_for_bit(
    tiny: Path, text: Path, tmp_path: Path, stored: str, how: str
) -> None:
    if stored == "float32":
        in_float32(tiny)
    # transformers multiplies values and scale in the scale's dtype, training in float32
    export = f"method: quantize, {how}, scale_dtype: float32, exclude_modules: [down_proj]"
    path = recipe(tmp_path, f"method: distill, qat: true, {TRAIN}", export)
    assign = tuple(word for word in SHORT if "=" in word)
    request = Request(
        "compress", str(path), str(tiny), assign=assign, device="cpu", folder=tmp_path
    )
    prepared = stage.prepare(request, Silent())
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    found = compress(prepared.job(out, work, Silent()))
    assert found.metrics["layers"] == 12

    # What the trainer's last forward passes computed with: its own weights, rounded.
    student: Any = AutoModelForCausalLM.from_pretrained(work / "step-0", dtype=torch.float32)
    master = load_file(work / "part-0" / "training" / "checkpoint-6" / "learned.safetensors")
    before = load_file(tiny / "model.safetensors")
    step = recipe_of(prepared).steps[1]
    dtype = getattr(torch, stored)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            assert not torch.equal(master[name], before[name].float()), "it has learned nothing"
            value = master[name].to(dtype)
            if "_proj" in name and "down" not in name:
                group = None if step.group_size == "channel" else step.group_size
                grid = Grid(step.bits, group, step.symmetric, step.scale_search)
                value = round_matrix(value, grid).dense()
            parameter.copy_(value)
        wanted = student(input_ids=torch.arange(3, 43).reshape(2, 20)).logits
    assert torch.equal(logits(out), wanted)

    # The same by the training's own code: what it measured is what was written.
    again: Any = AutoModelForCausalLM.from_pretrained(work / "step-0", dtype=torch.float32)
    with Rounding(work / "step-0", step).of(again), torch.no_grad():
        found_again = again(input_ids=torch.arange(3, 43).reshape(2, 20)).logits
    assert torch.equal(found_again, wanted)


def recipe_of(prepared: stage.Prepared) -> Any:
    return prepared.recipe


def test_training_for_a_rounding_leaves_less_of_its_damage(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    train = TRAIN.replace("6", "40")
    export = "method: quantize, bits: 4, group_size: channel"
    perplexity = {"false": 0.0, "true": 0.0}
    for qat in perplexity:
        path = recipe(tmp_path, f"method: distill, qat: {qat}, {train}", export)
        for seed in ("1", "2", "3"):  # of one alone, the last bits of a product can turn it round
            words = ("-m", "tiny", "-o", f"{qat}-{seed}", "--seed", seed, *SHORT)
            found = metrics(bmkit("compress", path, *words))
            perplexity[qat] += found["perplexity"] / 3
            assert qat == "false" or found["agreement"] > found["agreement_before"]
    assert perplexity["true"] < perplexity["false"]


def test_the_built_in_recipe_mends_what_rounding_breaks(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    words = ("-s", "steps.0.train.max_steps=12", "-s", "steps.0.train.learning_rate=2e-3")
    found = metrics(bmkit("compress", "qat", "-m", "tiny", "-o", "q", *SHORT, *words))
    plain = metrics(bmkit("compress", "int4", "-m", "tiny", "-o", "p", *SHORT))
    assert found["layers"] == plain["layers"] and found["bytes_after"] == plain["bytes_after"]
    assert found["agreement"] > found["agreement_before"]
    answer = bmkit("infer", "-m", "q", "-p", "Hi", "--max-new-tokens", "5")
    assert answer.returncode == 0, answer.stderr


def test_rounded_activations_are_trained_for_and_change_nothing_in_the_file(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    found = {}
    for name, words in (("without", ""), ("with", "activations: 8, ")):
        path = recipe(
            tmp_path, f"method: distill, qat: true, {words}{TRAIN}", "method: quantize, bits: 8"
        )
        found[name] = metrics(bmkit("compress", path, "-m", "tiny", "-o", name, *SHORT))
    assert found["with"]["train_loss"] != found["without"]["train_loss"]
    assert found["with"]["train_loss"] == pytest.approx(found["without"]["train_loss"], rel=0.1)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in found]
    assert configs[0] == configs[1]


def test_the_plan_counts_a_teacher_that_runs_beside(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    other_teacher(tmp_path / "other", tiny, num_hidden_layers=12, hidden_size=512)
    peaks = []
    for words in ("", "hidden: {}, ", "hidden: {}, attention: {}, "):
        path = recipe(tmp_path, f"method: distill, teacher: other, {words}{TRAIN}")
        done = bmkit("compress", path, "-m", "tiny", "-o", "x", "--plan", *SHORT)
        plan = json.loads(done.stdout)
        assert "other" in plan["steps"][0] and "steps.0.teacher" in plan["inputs"]
        peaks.append(plan["peak"]["ram_bytes"])
    assert peaks[0] < peaks[1] < peaks[2]


def test_zeros_stay_when_a_pruned_model_is_trained_for_a_rounding(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    path = recipe(
        tmp_path,
        'method: magnitude, pattern: "2:4"',
        f"method: distill, qat: true, {TRAIN}",
        "method: quantize, bits: 4, group_size: 32",
    )
    metrics(bmkit("compress", path, "-m", "tiny", "-o", "q", *SHORT))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "_proj" in name:
            assert ((weight != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all(), name


def other_teacher(folder: Path, tiny: Path, **changed: Any) -> Path:
    """Return another random model with the tokenizer of `tiny`."""
    shutil.copytree(tiny, folder)
    config = AutoConfig.from_pretrained(tiny)
    for key, value in changed.items():
        setattr(config, key, value)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_another_teacher_is_what_is_learned(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    other_teacher(tmp_path / "other", tiny, hidden_size=64, num_hidden_layers=3)
    train = TRAIN.replace("6", "40")
    own = recipe(tmp_path, f"method: distill, {train}")
    alone = metrics(bmkit("compress", own, "-m", "tiny", "-o", "own", *SHORT))
    assert alone["agreement_before"] == 1.0
    path = recipe(
        tmp_path,
        f"method: distill, teacher: other, hidden: {{}}, attention: {{weight: 0.5}}, {train}",
    )
    found = metrics(bmkit("compress", path, "-m", "tiny", "-o", "a", *SHORT))
    assert found["agreement_before"] < 0.5 and found["agreement"] > found["agreement_before"]
    names = load_file(tmp_path / "a" / "model.safetensors").keys()
    assert names == load_file(tiny / "model.safetensors").keys()
    manifest = json.loads((tmp_path / "a" / "bmkit.json").read_text())
    assert manifest["steps"][-1]["inputs"]["steps.0.teacher"]["path"].endswith("other")
    same = bmkit("compress", path, "-m", "tiny", "-o", "a", *SHORT)
    assert json.loads(same.stdout)["reused"]
    shutil.move(tmp_path / "other", tmp_path / "moved")
    moved = tmp_path / "moved.yaml"
    moved.write_text(path.read_text().replace("other", "moved"))
    again = json.loads(bmkit("compress", moved, "-m", "tiny", "-o", "b", *SHORT).stdout)
    key = json.loads(same.stdout)["key"]
    assert (again["key"], again["digest"]) == (key, json.loads(same.stdout)["digest"])
    other_teacher(tmp_path / "other", tiny, hidden_size=64, num_hidden_layers=2)
    new = json.loads(bmkit("compress", path, "-m", "tiny", "-o", "c", *SHORT).stdout)
    assert new["key"] != key and new["digest"] != again["digest"]


def test_a_teacher_is_rounded_or_streamed(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    found = {}
    for name, words in (
        ("plain", ""),
        ("int8", "teacher_quant: int8, "),
        ("streamed", "teacher_memory: 80KiB, "),
    ):
        learned = f"method: distill, hidden: {{}}, {words}{TRAIN}"
        path = recipe(tmp_path, "method: magnitude", learned)
        found[name] = metrics(bmkit("compress", path, "-m", "tiny", "-o", name, *SHORT))
    losses = {name: f["train_loss"] for name, f in found.items()}
    assert losses["int8"] == pytest.approx(losses["plain"], rel=0.2)
    assert losses["int8"] != losses["plain"]
    assert losses["streamed"] == pytest.approx(losses["plain"], rel=1e-3)


@pytest.mark.parametrize(
    ("step", "code", "said"),
    [
        ("method: distill, qat: true", 2, "`quantize` right behind it"),
        ("method: distill, activations: 8", 2, "needs `qat: true`"),
        ("method: distill, loss: reverse_kl, temperature: 2.0", 2, "reverse_kl"),
        ("method: distill, label_weight: 1.5", 2, "label_weight"),
        ("method: distill, hidden: {layers: [[0, 1], [1, 2]]}", 2, "has 2 layers"),
        ("method: distill, hidden: {layers: [[0, -1]]}", 2, "numbers, from 0"),
        ("method: distill, hidden: {layers: []}", 2, "numbers, from 0"),
        ("method: distill, teacher_memory: much", 2, "not a size"),
        ("method: distill, teacher_memory: 1KiB", 4, "teacher_memory"),
        ("method: distill, teacher: gone", 3, "gone"),
        ("method: distill, teacher: larger", 3, "vocabulary of 300 tokens"),
        ("method: distill, teacher: foreign", 3, "another vocabulary"),
        ("method: distill, teacher: delta", 3, "not a model"),
    ],
)
def test_what_can_not_be_learned_is_refused(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path, step: str, code: int, said: str
) -> None:
    if "larger" in step:
        other_teacher(tmp_path / "larger", tiny, vocab_size=300)
    if "foreign" in step:
        shutil.copytree(tiny, tmp_path / "foreign")
        file = tmp_path / "foreign" / "tokenizer.json"
        file.write_text(file.read_text().replace('"a":', '"@@":').replace('"b":', '"a":'))
    if "delta" in step:
        (tmp_path / "delta").mkdir()
        (tmp_path / "delta" / "adapter_config.json").write_text("{}")
        save_file({"a": torch.zeros(1)}, tmp_path / "delta" / "adapter_model.safetensors")
    done = bmkit("compress", recipe(tmp_path, f"{step}, {TRAIN}"), "-m", "tiny", "-o", "x", *SHORT)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "x").exists()


def test_an_encoder_is_refused(bmkit: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
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
    path = recipe(tmp_path, f"method: distill, {TRAIN}")
    done = bmkit("compress", path, "-m", "bert", "-o", "x", *SHORT)
    assert done.returncode == 3 and "says no next token" in done.stderr


def test_a_stopped_run_goes_on_with_its_projections(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Of six steps the last two again: the same weights come out, so nothing was left behind."""
    step = f"method: distill, qat: true, hidden: {{projection: always}}, {TRAIN}"
    step = step.replace("max_steps: 6", "max_steps: 6, save_steps: 2")
    path = recipe(tmp_path, step, "method: quantize")
    assign = tuple(word for word in SHORT if "=" in word)
    request = Request(
        "compress", str(path), str(tiny), assign=assign, device="cpu", folder=tmp_path
    )
    found = []
    for name in ("whole", "stopped"):
        prepared = stage.prepare(request, Silent())
        out, work = tmp_path / f"out-{name}", tmp_path / f"work-{name}"
        out.mkdir()
        if name == "stopped":
            shutil.copytree(tmp_path / "work-whole" / "part-0", work / "part-0")
            shutil.rmtree(work / "part-0" / "training" / "checkpoint-6")
        work.mkdir(exist_ok=True)
        compress(prepared.job(out, work, Silent()))
        found.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize("rows", ["texts", "completions"])
def test_an_encoder_decoder_is_pruned_healed_and_rounded(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path, rows: str
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=400, **sizes, decoder_start_token_id=0, dropout_rate=0.0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(tmp_path / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, tmp_path / "t5" / file)
    prune = "method: magnitude, pattern: '2:4'"
    learn = f"method: distill, qat: true, {TRAIN.replace('6', '30')}"
    path = recipe(tmp_path, prune, learn, "method: quantize, bits: 4, group_size: 32")
    words = [*SHORT]
    if rows == "completions":
        lines = [
            {"prompt": f"{i} and {i + 1}?", "completion": WORDS[i : i + 40]} for i in range(60)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        words[1] = "data.calibration=rows.jsonl"
    found = metrics(bmkit("compress", path, "-m", "t5", "-o", "x", *words))
    assert found["agreement"] > found["agreement_before"]
    table = json.loads((tmp_path / "x" / "bmkit.json").read_text())["table"]
    assert [line["step"] for line in table] == ["before", "magnitude", "distill", "quantize"]
    assert table[2]["nonzeros"] <= table[1]["nonzeros"]
    assert bmkit("infer", "-m", "x", "-p", "Hi", "--max-new-tokens", "5").returncode == 0


@pytest.mark.parametrize("more", [("-s", "data.calibration=prompts.jsonl"), ()])
def test_an_encoder_decoder_makes_up_nothing_to_learn_from(
    bmkit: Run, tiny: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=400, **sizes, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, tmp_path / "t5" / file)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?"}\n' * 9)
    path = recipe(tmp_path, f"method: distill, {TRAIN}")
    done = bmkit("compress", path, "-m", "t5", "-o", "x", *more)
    assert done.returncode == 3, done.stderr
    assert "makes up nothing" in done.stderr and "data.calibration" in done.stderr
