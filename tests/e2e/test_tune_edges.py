"""`bmkit tune` where it is easily wrong: what is in front, other heads, short contexts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
)

Run = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ("-s", "train.max_steps=20", "-s", "train.learning_rate=0.02", "--json")
SHORT = (*SHORT, "-s", "train.per_device_train_batch_size=8", "-s", "data.max_length=64")
CALM = ("-s", "train.learning_rate=0.005")
COLOURS = ("red", "green", "blue")


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def metrics(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    return dict(result(done)["metrics"])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(folder: Path, *deltas: str, more: str = "") -> Path:
    """Write a recipe with these deltas, in YAML's short form."""
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    lines = "".join(f"  - {{{delta}}}\n" for delta in deltas)
    head = f"deltas:\n{lines}" if deltas else ""
    path.write_text(f"kind: tune\n{head}data: {{train: x.jsonl}}\n{more}")
    return path


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_what_begins_with_a_part_of_the_weights_is_kept_as_plain_lora(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, begun: str
) -> None:
    path = recipe(tmp_path, f"type: lora, r: 4, init_lora_weights: {begun}")
    found = metrics(bmkit("tune", path, "-m", "tiny", "--data", texts, "-o", "d", *SHORT))
    values = json.loads((tmp_path / "d" / "adapter_config.json").read_text())
    assert values["init_lora_weights"] is True and values["r"] == 8
    again = metrics(
        bmkit("tune", path, "-m", "tiny", "--data", texts, "-o", "m", *SHORT, "-s", "merge=true")
    )
    assert again["dev_loss"] == found["dev_loss"]
    asked = write(tmp_path / "in.jsonl", [{"prompt": f"Number {i}?"} for i in range(4)])
    words = ("--score", "-i", asked, "--json")
    kept, merged = (rows_of(bmkit("infer", "-m", name, *words)) for name in ("d", "m"))
    for one, other in zip(kept, merged, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], rel=0.01)  # in bfloat16


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
def test_what_stands_in_front_answers_alone_as_beside_others(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, method: str
) -> None:
    words = ("--data", texts, "-o", "d", *SHORT)
    assert bmkit("tune", method, "-m", "tiny", *words).returncode == 0
    asked = [{"prompt": "Number " + "9" * i + "?"} for i in (1, 7, 30)]
    rows = write(tmp_path / "in.jsonl", asked)
    words = ("-i", rows, "--max-new-tokens", "6", "--json")
    together = rows_of(bmkit("infer", "-m", "d", *words))
    alone = rows_of(bmkit("infer", "-m", "d", *words, "-s", "batch_size=1"))
    assert [r["token_ids"] for r in together] == [r["token_ids"] for r in alone]
    told = rows_of(bmkit("infer", "-m", "d", "--score", "-i", rows, "--json"))
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "d").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for row, said in zip(asked, told, strict=True):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        log = logits[-ids.shape[1] :].log_softmax(-1)[:-1]
        wanted = float(log.gather(1, ids[0, 1:, None]).sum())
        assert said["logprob"] == pytest.approx(wanted, rel=1e-3)
    refused = bmkit("spec-decode", "-m", "d", "-p", "Hi")
    assert refused.returncode == 3 and "in front" in refused.stderr


def test_a_classifier_learns_labels_in_another_order_than_it_knew(
    bmkit: Run, bert: Path, labelled: Path, tmp_path: Path
) -> None:
    words = ("--data", labelled, *SHORT, "-s", "train.max_steps=100", *CALM)
    order = ("-s", "data.labels=[red,green,blue]")
    merged = bmkit("tune", "lora", "-m", bert, "-o", "m", *words, *order, "-s", "merge=true")
    assert metrics(merged)["dev_accuracy"] > 0.9
    order = ("-s", "data.labels=[blue,red,green]")
    found = metrics(bmkit("tune", "lora", "-m", "m", "-o", "d", *words, *order))
    assert found["dev_accuracy_before"] < 0.7 < found["dev_accuracy"]
    asked = write(tmp_path / "in.jsonl", [{"text": f"{c} 100"} for c in COLOURS])
    for more in ((), ("-s", "dtype=bfloat16")):
        said = rows_of(bmkit("infer", "-m", "d", "-i", asked, "--json", *more))
        assert sum(row["label"] == c for row, c in zip(said, COLOURS, strict=True)) >= 2
    null = write(tmp_path / "null.jsonl", [{"text": "red", "adapter": None}])
    refused = bmkit("infer", "-m", "d", "-i", null, "--json")
    assert refused.returncode == 3 and "no head" in refused.stderr


def test_rows_end_where_the_model_does(
    bmkit: Run, tiny: Path, tmp_path: Path, with_tokenizer: Any
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    with_tokenizer(tmp_path / "gpt2")
    write(tmp_path / "rows.jsonl", [{"prompt": "a" * 100, "completion": "b" * 100}] * 2)
    write(tmp_path / "texts.jsonl", [{"text": "a" * 100, "label": x} for x in "pq"])
    for method, data in (("prompt", "rows.jsonl"), ("lora", "rows.jsonl"), ("lora", "texts.jsonl")):
        target = () if method == "prompt" else ("-s", "deltas.0.target_modules=[attn.qkv]")
        done = bmkit("tune", method, "-m", "gpt2", "--data", data, *SHORT, *target, "--force")
        if data == "rows.jsonl":  # the prompt alone is longer than the model reads
            assert done.returncode == 3 and "anything to learn" in done.stderr
        else:
            assert metrics(done)["rows_truncated"] == 2


@pytest.mark.parametrize(
    ("deltas", "more", "said"),
    [
        (["type: prompt"], "unfreeze: [model.norm]\n", "keeps none"),
        (["type: adapter"], "merge: true\n", "merge"),
        (["type: lora, rank_pattern: {q_prj: 2}"], "", "q_prj"),
        (["type: adalora"], "train: {load_best_model_at_end: true}\n", "load_best"),
        (["type: prefix"], "train: {gradient_checkpointing: true}\n", "prefix"),
    ],
)
def test_what_would_be_in_vain_is_told_before_it_is_trained(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, deltas: list[str], more: str, said: str
) -> None:
    path = recipe(tmp_path, *deltas, more=more)
    done = bmkit("tune", path, "-m", "tiny", "--data", texts, "-o", "x")
    assert done.returncode == 2 and said in done.stderr
    assert "steps" not in done.stderr


def test_single_pairs_and_steps_are_learned_from(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(4)]
    write(tmp_path / "pairs.jsonl", rows)
    one = ("-s", "train.per_device_train_batch_size=1", "-s", "train.learning_rate=1e-9", "--json")
    found = metrics(bmkit("tune", "lora", "-m", "tiny", "--data", "pairs.jsonl", *one))
    assert found["train_loss"] == pytest.approx(0.693147, abs=1e-4)
    write(tmp_path / "say.jsonl", [{"text": "one row"}])
    words = ("--data", "say.jsonl", "-s", "train.max_steps=1", "--json")
    assert metrics(bmkit("tune", "adalora", "-m", "tiny", *words))["steps"] == 1


def test_a_sweep_goes_on_behind_a_run_that_diverges(bmkit: Run, tiny: Path, texts: Path) -> None:
    words = ("--data", texts, *SHORT[:2], "--grid", "train.learning_rate=1e30,0.01")
    done = bmkit("tune", "lora", "-m", "tiny", *words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"] == "learning_rate=0.01"
    assert "not a number" in done.stderr


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", "1", None])
def test_what_rows_are_filled_up_with_never_enters_the_loss(
    bmkit: Run, tiny: Path, tmp_path: Path, pad: str | None
) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny)
    number = None if pad is None else own.convert_tokens_to_ids(pad)
    for name, key, value in (
        ("config.json", "pad_token_id", number),
        ("tokenizer_config.json", "pad_token", pad),
    ):
        values = json.loads((tiny / name).read_text())
        (tiny / name).write_text(json.dumps({**values, key: value}))
    rows = [{"prompt": "1" * i, "completion": "1 or 11"} for i in (1, 20, 3, 12)]
    data = write(tmp_path / "rows.jsonl", rows)
    words = ("--data", data, "-s", f"data.dev={data}", "-s", "train.max_steps=1", "--json")
    words = (*words, "-s", "train.per_device_train_batch_size=4", "-s", "data.format=raw")
    found = metrics(bmkit("tune", "lora", "-m", "tiny", *words))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    total, count = 0.0, 0
    for row in rows:
        ids = own(row["prompt"] + row["completion"] + "<|im_end|>", return_tensors="pt").input_ids
        told = model(ids).logits[0, :-1].log_softmax(-1).detach()
        at = len(row["prompt"])
        total -= float(told.gather(1, ids[0, 1:, None])[at - 1 :].sum())
        count += ids.shape[1] - at
    assert found["labelled_tokens"] == count
    assert found["train_loss"] == pytest.approx(total / count, rel=1e-4)
    assert found["dev_loss_before"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_what_needs_tensorboard_is_refused_before_training_where_there_is_none(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    words = ("-m", "tiny", "--data", texts, "-o", "x", "-s", "train.tensorboard=true")
    for more in ((), ("--plan",)):
        done = bmkit("tune", "lora", *words, *more)
        assert done.returncode == 4 and "bmkit[tensorboard]" in done.stderr
    assert not (tmp_path / "x").exists()


def test_tokens_alone_keep_no_new_head_and_say_so(
    bmkit: Run, tiny: Path, labelled: Path, tmp_path: Path
) -> None:
    tokens = 'type: trainable_tokens, tokens: ["a", "b"]'
    alone = recipe(tmp_path, tokens)
    done = bmkit("tune", alone, "-m", "tiny", "--data", labelled, "-o", "d", *SHORT)
    assert done.returncode == 2
    assert "score" in done.stderr and "bitfit" in done.stderr
    both = recipe(tmp_path, tokens, "type: bitfit")
    found = metrics(bmkit("tune", both, "-m", "tiny", "--data", labelled, "-o", "d", *SHORT))
    assert found["dev_accuracy"] >= 0


def test_lora_on_a_rounded_model_begins_with_what_was_lost(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    assert bmkit("compress", "int4", "-m", tiny, "-o", "c").returncode == 0
    words = ("-s", "train.max_steps=1", "-s", "train.learning_rate=1e-9", "-s", "deltas.0.r=32")

    def loss(model: object, out: str, *more: str) -> dict[str, float]:
        asked = ("tune", "lora", "-m", model, "--data", texts, "-o", out, *words, *more, "--json")
        done = bmkit(*asked)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)["metrics"])

    whole, rounded = loss(tiny, "a")["dev_loss"], loss("c", "b")["dev_loss"]
    begun = loss("c", "d", "-s", f"original={tiny}")
    # Of so high a rank nothing is left of it.
    assert abs(begun["dev_loss"] - whole) < 0.01 < abs(rounded - whole)
    assert begun["lost_share_left"] < 1e-6
    # It is a plain LoRA of the rounded model.
    assert json.loads((tmp_path / "d" / "adapter_config.json").read_text())["r"] == 32
    same = bmkit("tune", "lora", "-m", tiny, "--data", texts, "-o", "f", "-s", f"original={tiny}")
    assert same.returncode == 3 and "nothing was lost" in same.stderr
    twice = ("-s", f"original={tiny}", "-s", "deltas.0.use_dora=true")
    refused = bmkit("tune", "lora", "-m", "c", "--data", texts, "-o", "g", *twice)
    assert refused.returncode == 2 and "original" in refused.stderr
