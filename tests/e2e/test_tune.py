"""`bmkit tune`: tasks, several deltas, what is unfrozen, sweeps, and what `infer` makes of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    Qwen2MoeConfig,
    T5Config,
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


def test_a_text_gets_a_label_and_infer_tells_it(
    bmkit: Run, tiny: Path, labelled: Path, tmp_path: Path
) -> None:
    words = ("-s", "train.max_steps=60", "-s", "train.learning_rate=0.01")
    found = metrics(
        bmkit("tune", "lora", "-m", "tiny", "--data", labelled, "-o", "d", *SHORT, *words)
    )
    assert found["dev_accuracy"] > 0.7 > found["dev_accuracy_before"] + 0.2
    assert found["dev_f1"] > 0.65
    rows = write(tmp_path / "in.jsonl", [{"text": f"{c} 100"} for c in COLOURS])
    done = bmkit("infer", "-m", "d", "-i", rows, "--json")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(row["probabilities"]) for row in said] == [set(COLOURS)] * 3
    assert sum(row["label"] == c for row, c in zip(said, COLOURS, strict=True)) >= 2
    from peft import AutoPeftModelForSequenceClassification

    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "d", num_labels=3, dtype=torch.float32
    )
    plain.config.get_text_config().pad_token_id = 0
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny)("red 100", return_tensors="pt")
    with torch.no_grad():
        shares = plain(input_ids=ids["input_ids"]).logits.softmax(-1)[0]
    wanted = [said[0]["probabilities"][c] for c in sorted(COLOURS, key=lambda c: (0, c))]
    assert shares.tolist() == pytest.approx(wanted, abs=1e-4)


def test_a_merged_classifier_is_a_model_that_loads_elsewhere(
    bmkit: Run, bert: Path, labelled: Path, tmp_path: Path
) -> None:
    found = result(
        bmkit(
            *("tune", "lora", "-m", bert, "--data", labelled, "-o", "m", *SHORT),
            *("-s", "merge=true"),
        )
    )
    assert found["kind"] == "model"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert sorted(model.config.id2label.values()) == sorted(COLOURS)
    said = json.loads(bmkit("infer", "-m", "m", "-p", "red 100", "--json").stdout)
    assert set(said["probabilities"]) == set(COLOURS)


@pytest.mark.parametrize("merge", ["false", "true"])
def test_words_get_tags(bmkit: Run, bert: Path, tmp_path: Path, merge: str) -> None:
    rows = [{"tokens": ["the", str(i), "cats"], "tags": ["O", "NUM", "O"]} for i in range(40)]
    write(tmp_path / "train.jsonl", rows[:32])
    write(tmp_path / "dev.jsonl", rows[32:])
    found = metrics(
        bmkit(
            *("tune", "adapter", "-m", bert, "--data", "train.jsonl", "-o", "d", *SHORT),
            *("-s", "data.dev=dev.jsonl", "-s", "train.max_steps=60", *CALM),
        )
        if merge == "false"
        else bmkit(
            *("tune", "lora", "-m", bert, "--data", "train.jsonl", "-o", "d", *SHORT),
            *("-s", "data.dev=dev.jsonl", "-s", "train.max_steps=60", "-s", "merge=true", *CALM),
        )
    )
    assert found["dev_accuracy"] > 0.9
    asked = write(tmp_path / "in.jsonl", [{"tokens": ["the", "7", "cats"]}, {"prompt": "the 9"}])
    done = bmkit("infer", "-m", "d", "-i", asked, "--json")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said[0]["tags"] == ["O", "NUM", "O"] and said[0]["tokens"] == ["the", "7", "cats"]
    assert said[1]["tags"] == ["O", "NUM"]
    if merge == "true":
        AutoModelForTokenClassification.from_pretrained(tmp_path / "d")


@pytest.mark.parametrize("method", ["parallel_adapter", "adapter", "bitfit", "ia3", "layer_norm"])
def test_defaults_fit_a_model_whose_feed_forward_is_no_module(
    bmkit: Run, bert: Path, labelled: Path, method: str
) -> None:
    found = metrics(bmkit("tune", method, "-m", bert, "--data", labelled, "-o", "d", *SHORT))
    assert found["dev_loss"] < found["dev_loss_before"]


def test_an_encoder_decoder_learns_what_to_say(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, with_tokenizer: Any
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=400, **sizes, decoder_start_token_id=0)  # type: ignore[arg-type]
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    with_tokenizer(tmp_path / "t5")
    found = metrics(bmkit("tune", "lora", "-m", "t5", "--data", texts, "-o", "d", *SHORT))
    assert found["dev_loss"] < 0.8 * found["dev_loss_before"]
    done = bmkit("infer", "-m", "d", "-p", "Number 3?", "--max-new-tokens", "5", "--json")
    assert done.returncode == 0, done.stderr


def test_an_encoder_learns_to_fill_gaps(bmkit: Run, bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat sat on the mat, and so on " * 3} for _ in range(24)]
    write(tmp_path / "train.jsonl", rows)
    path = recipe(tmp_path, more="unfreeze: [all]\nmerge: true\n")
    words = ("--data", "train.jsonl", "-o", "d", *SHORT, "-s", "data.dev=train.jsonl")
    found = metrics(bmkit("tune", path, "-m", bert, *words, "-s", "train.learning_rate=0.005"))
    assert found["dev_loss"] < 0.7 * found["dev_loss_before"]
    AutoModelForMaskedLM.from_pretrained(tmp_path / "d")


PAIRS = {
    "two of PEFT's": ("type: lora", "type: layer_norm"),
    "one of PEFT's, one of ours": ("type: lora", "type: adapter"),
    "on the same layers": ("type: lora, target_modules: [mlp.down]", "type: bitfit"),
    "twice the same": ("type: lora, layers: [0]", "type: lora, layers: [1], r: 2"),
    "in front, and inside": ("type: ia3", "type: prompt, num_virtual_tokens: 3"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_several_deltas_are_trained_together_and_kept_apart(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, name: str
) -> None:
    path = recipe(tmp_path, *PAIRS[name])
    found = metrics(bmkit("tune", path, "-m", "tiny", "--data", texts, "-o", "d", *SHORT))
    assert found["dev_loss"] < found["dev_loss_before"]
    order = json.loads((tmp_path / "d" / "deltas.json").read_text())["deltas"]
    folders = [tmp_path / "d" / "adapters" / one for one in order]
    assert len(folders) == 2 and all((f / "adapter_config.json").is_file() for f in folders)
    rows = write(
        tmp_path / "in.jsonl", [{"prompt": "Number 3?", "adapter": a} for a in (*order, None)]
    )
    words = ("--max-new-tokens", "8", "--json")
    both = bmkit("infer", "-m", "d", "-p", "Number 3?", *words)
    assert both.returncode == 0, both.stderr
    apart = bmkit("infer", "-m", "d", "-i", rows, *words)
    assert apart.returncode == 0, apart.stderr
    said = [json.loads(line)["token_ids"] for line in apart.stdout.splitlines()]
    base = bmkit("infer", "-m", "tiny", "-p", "Number 3?", *words)
    assert said[2] == json.loads(base.stdout)["token_ids"]
    one = bmkit("infer", "-m", "tiny", "--adapter", folders[0], "-p", "Number 3?", *words)
    assert json.loads(one.stdout)["token_ids"] == said[0]


@pytest.mark.parametrize("second", ["type: lora, name: b, layers: [1]", "type: adapter, name: b"])
def test_a_row_names_an_artifact_of_several_deltas_as_a_whole(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, second: str
) -> None:
    path = recipe(tmp_path, "type: lora, name: a", second)
    assert bmkit("tune", path, "-m", "tiny", "--data", texts, "-o", "two", *SHORT).returncode == 0
    words = ("--data", texts, *SHORT, "--seed", "3")
    assert bmkit("tune", "lora", "-m", "tiny", "-o", "one", *words).returncode == 0
    asked = [{"prompt": "Number 3?", "adapter": name} for name in ("two", "one", "a", "b")]
    rows = write(tmp_path / "in.jsonl", asked)
    words = ("--max-new-tokens", "8", "--json")
    given = ("-m", "tiny", "--adapter", "two", "--adapter", "one")
    done = bmkit("infer", *given, "-i", rows, *words)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line)["token_ids"] for line in done.stdout.splitlines()]
    parts = [tmp_path / "two" / "adapters" / name for name in "ab"]
    for found, names in zip(said, (("two",), ("one",), (parts[0],), (parts[1],)), strict=True):
        chosen = [word for name in names for word in ("--adapter", name)]
        alone = bmkit("infer", "-m", "tiny", *chosen, "-p", "Number 3?", *words)
        assert found == json.loads(alone.stdout)["token_ids"]
    assert len({tuple(ids) for ids in said}) > 2
    whole = write(tmp_path / "whole.jsonl", asked[:1])
    itself = bmkit("infer", "-m", "two", "-i", whole, *words)
    assert json.loads(itself.stdout)["token_ids"] == said[0]
    strange = write(tmp_path / "no.jsonl", [{"prompt": "Hi", "adapter": "tow"}])
    refused = bmkit("infer", *given, "-i", strange, *words)
    assert refused.returncode == 3 and "a, b, one, two" in refused.stderr


def test_what_is_unfrozen_is_trained_and_kept_with_the_delta(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, "type: lora", more="unfreeze: [model.norm]\n")
    found = metrics(bmkit("tune", path, "-m", "tiny", "--data", texts, "-o", "d", *SHORT))
    assert found["dev_loss"] < found["dev_loss_before"]
    kept = load_file(tmp_path / "d" / "adapter_model.safetensors")
    norm = next(t for name, t in kept.items() if name.endswith("model.norm.weight"))
    own = load_file(tiny / "model.safetensors")["model.norm.weight"]
    assert not torch.equal(norm.float(), own.float())
    assert bmkit("infer", "-m", "d", "-p", "Hi", "--max-new-tokens", "4").returncode == 0


@pytest.mark.parametrize("what", ["all", "mlp", "norm"])
def test_without_a_delta_the_model_itself_is_trained(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, what: str
) -> None:
    path = recipe(tmp_path, more=f"unfreeze: [{what}]\nmerge: true\n")
    done = bmkit("tune", path, "-m", "tiny", "--data", texts, "-o", "m", *SHORT)
    assert result(done)["kind"] == "model"
    assert metrics(done)["dev_loss"] < metrics(done)["dev_loss_before"]
    before, after = (load_file(p / "model.safetensors") for p in (tiny, tmp_path / "m"))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    wanted = {n for n in before if what == "all" or what in n}
    assert changed <= wanted and len(changed) > len(wanted) // 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_run_of_one_step_trains(bmkit: Run, tiny: Path, texts: Path, tmp_path: Path) -> None:
    one = (*SHORT, "-s", "train.max_steps=1", "-s", "merge=false")
    done = bmkit("tune", "lora", "-m", "tiny", "--data", texts, "-o", "one", *one)
    assert done.returncode == 0, done.stderr
    (weights,) = (tmp_path / "one").glob("**/adapter_model.safetensors")
    grown = [value for name, value in load_file(weights).items() if "lora_B" in name]
    assert grown and all(value.any() for value in grown)


def test_the_best_weights_are_kept_and_training_stops_where_nothing_gets_better(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    words = ("-s", "train.eval_steps=2", "-s", "train.early_stopping_patience=2")
    words = (*words, "-s", "train.max_steps=60", "-s", "train.learning_rate=0.3")
    found = metrics(bmkit("tune", "lora", "-m", "tiny", "--data", texts, "-o", "d", *SHORT, *words))
    assert found["steps"] < 60
    lines = (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()
    told = [row for row in map(json.loads, lines) if "dev_loss" in row]
    best = min(told, key=lambda row: row["dev_loss"])
    assert found["best_step"] == best["step"]
    assert found["dev_loss"] == pytest.approx(best["dev_loss"], rel=1e-4)
    assert (tmp_path / "d" / "loss.svg").read_text().count("<polyline") == 2


@pytest.mark.parametrize("every", [2, 3])
def test_what_is_measured_meanwhile_changes_no_figure(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, every: int
) -> None:
    four = (*SHORT, "-s", "train.max_steps=4")
    plain = metrics(bmkit("tune", "lora", "-m", "tiny", "--data", texts, "-o", "a", *four))
    words = (*four, "-s", f"train.eval_steps={every}")
    found = metrics(bmkit("tune", "lora", "-m", "tiny", "--data", texts, "-o", "b", *words))
    assert found == pytest.approx(plain, rel=1e-5)
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    told = [row for row in map(json.loads, lines) if "dev_loss" in row]
    assert [row["step"] for row in told] == list(range(every, 5, every))


def test_strength_is_a_part_of_what_was_learned_and_what_is_measured(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    words = (*SHORT, "-s", "train.eval_steps=2", "-s", "train.max_steps=4", "-s", "merge=false")
    words = (*words, "-s", "train.learning_rate=0.01")
    whole = metrics(bmkit("tune", "lora", "-m", "tiny", "--data", texts, "-o", "a", *words))
    words = (*words, "-s", "strength=0.5")
    half = metrics(bmkit("tune", "lora", "-m", "tiny", "--data", texts, "-o", "b", *words))
    one, other = (
        load_file(next((tmp_path / name).glob("**/adapter_model.safetensors"))) for name in "ab"
    )
    for name, weight in one.items():
        wanted = weight * 0.5 if "lora_B" in name else weight
        assert torch.equal(other[name], wanted)
    assert half["train_loss"] == whole["train_loss"]
    assert whole["dev_loss"] < half["dev_loss"] < half["dev_loss_before"]
    for more in ("deltas=[{type: bitfit}]", "deltas.0.use_dora=true"):
        done = bmkit(
            *("tune", "lora", "-m", "tiny", "--data", texts, "-s", "strength=0.5", "-s", more)
        )
        assert done.returncode == 2 and "strength" in done.stderr


def test_a_sweep_runs_all_and_names_the_best(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    words = ("--grid", "deltas.0.r=2,4", "--grid", "train.learning_rate=1e-6,0.02")
    done = bmkit("tune", "lora", "-m", "tiny", "--data", texts, "-o", "sweep", *SHORT[:4], *words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / done.stdout.strip()
    assert folder.is_dir() and "learning_rate=0.02" in folder.name
    assert len(list((tmp_path / "sweep").iterdir())) == 4
    assert done.stderr.count("r=") >= 8 and "best by dev_loss" in done.stderr
    again = bmkit(
        *("tune", "lora", "-m", "tiny", "--data", texts, "-o", "sweep", *SHORT[:4], *words),
        *("--json",),
    )
    runs = json.loads(again.stdout)["runs"]
    assert [run["reused"] for run in runs] == [True] * 4
    wrong = bmkit("tune", "lora", "-m", "tiny", "--data", texts, "--grid", "deltas.0.rr=2,4")
    assert wrong.returncode == 2 and "rr" in wrong.stderr
    for word in ("deltas.0.r", "deltas.0.r=", "=2"):
        assert bmkit("tune", "lora", "-m", "tiny", "--grid", word).returncode == 2


def test_the_model_is_shown_as_a_tree_with_what_would_be_trained(
    bmkit: Run, tiny: Path, texts: Path
) -> None:
    done = bmkit("tune", "lora", "-m", "tiny", "--data", texts, "--inspect")
    assert done.returncode == 0, done.stderr
    assert "layers" in done.stdout and "lora" in done.stdout
    found = bmkit("tune", "lora", "-m", "tiny", "--data", texts, "--inspect", "--json")
    values = json.loads(found.stdout)
    small = metrics(
        bmkit("tune", "lora", "-m", "tiny", "--data", texts, *SHORT, "-s", "train.max_steps=1")
    )
    assert str(int(small["trainable_parameters"])) in json.dumps(values)


@pytest.mark.parametrize("name", ["tiny", "bert"])
def test_a_new_head_is_counted_and_shown(
    bmkit: Run, tiny: Path, bert: Path, labelled: Path, name: str
) -> None:
    """BERT's checkpoint, which fills gaps, has no pooler either."""
    words = ("tune", "lora", "-m", name, "--data", labelled, *SHORT[:2], "-s", "train.max_steps=1")
    found = metrics(bmkit(*words, "--json"))
    new = {"tiny": 3 * 32, "bert": 3 * 32 + 3 + 32 * 32 + 32}[name]
    shown = bmkit(*words, "--inspect")
    (line,) = (
        x
        for x in shown.stdout.splitlines()
        if f" {'score' if name == 'tiny' else 'classifier'} " in x
    )
    assert "+" in line and "head" in line and "[3, 32]" in line
    assert f"{found['trainable_parameters']:,} of " in shown.stdout
    values = json.loads(bmkit(*words, "--inspect", "--json").stdout)
    assert values["trained"] == found["trainable_parameters"]
    assert f"head for 3 labels ({new} parameters)" in bmkit(*words, "--plan").stdout
    steps = json.loads(bmkit(*words, "--plan", "--json").stdout)["steps"]
    assert steps[-1] == f"train a head for 3 labels ({new} parameters)"


@pytest.mark.parametrize(
    ("deltas", "more", "code", "said"),
    [
        (["type: lora, target_modules: [q_prj]"], "", 2, "q_proj"),
        (["type: lora, target_modules: [cross.q]"], "", 2, "cross"),
        (["type: layer_norm, target_modules: [q_proj]"], "", 2, "q_proj"),
        (["type: lora, layers: [7]"], "", 2, "layer 7"),
        (["type: lora, r: 40"], "", 2, "rank"),
        (["type: lora, name: a", "type: ia3, name: a"], "", 2, "two are called"),
        (["type: prefix", "type: prompt"], "", 2, "in front"),
        (["type: lora", "type: lorra"], "", 2, "lora"),
        ([], "", 2, "nothing is trained"),
        ([], "unfreeze: [norm]\n", 2, "has to be true"),
        (["type: lora"], "unfreeze: [nrm]\n", 2, "nrm"),
        (["type: adapter"], "merge: true\n", 2, "merge"),
        (["type: adapter, non_linearity: gelou"], "", 2, "gelou"),
        (["type: trainable_tokens, tokens: [hello world]"], "", 2, "tokens"),
        (["type: oft, oft_block_size: 7"], "", 2, "7"),
        (["type: lora"], "task: seq2seq_lm\n", 3, "encoder-decoder"),
        (["type: lora"], "train: {load_best_model_at_end: true}\n", 2, "data.dev"),
    ],
)
def test_what_can_not_be_done_is_refused(
    bmkit: Run,
    tiny: Path,
    texts: Path,
    tmp_path: Path,
    deltas: list[str],
    more: str,
    code: int,
    said: str,
) -> None:
    path = recipe(tmp_path, *deltas, more=more)
    words = ("--data", texts / "train.jsonl", "-o", "x", *SHORT[:2])
    done = bmkit("tune", path, "-m", "tiny", *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"text": "a", "label": "x"}] * 3, (), "one label only"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c"}], (), "3:"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "yes"}],
            ("-s", "data.labels=[x,y]"),
            "none of the labels",
        ),
        ([{"tokens": ["a", "b"], "tags": ["x"]}] * 2, (), "2 `tokens` and 1 `tags`"),
        ([], (), "no rows"),
    ],
)
def test_rows_that_can_not_be_learned_are_named(
    bmkit: Run, tiny: Path, tmp_path: Path, rows: list[Any], more: tuple[str, ...], said: str
) -> None:
    write(tmp_path / "rows.jsonl", rows)
    done = bmkit("tune", "lora", "-m", "tiny", "--data", "rows.jsonl", "-o", "x", *more)
    assert done.returncode == 3, done.stderr
    assert said in done.stderr


def test_a_head_of_conv1d_layers_is_tuned_too(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, with_tokenizer: Any
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    with_tokenizer(tmp_path / "gpt2")
    path = recipe(tmp_path, "type: lora, target_modules: [attn.qkv, mlp.up]", "type: adapter")
    found = metrics(bmkit("tune", path, "-m", "gpt2", "--data", texts, "-o", "d", *SHORT))
    assert found["dev_loss"] < found["dev_loss_before"]
    assert bmkit("infer", "-m", "d", "-p", "Hi", "--max-new-tokens", "4").returncode == 0


def test_what_frozen_blocks_say_is_kept_and_nothing_changes_by_it(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, "type: lora, last: 1")
    words = ("--data", texts, "--json", "-s", "train.num_train_epochs=3")
    lean, plain = (
        bmkit("tune", path, "-m", "tiny", "-o", name, *words, "-s", f"cache_states={value}")
        for name, value in (("lean", "auto"), ("plain", "false"))
    )
    assert "first 1 blocks" in lean.stderr and "first" not in plain.stderr
    for name, value in metrics(plain).items():
        assert metrics(lean)[name] == pytest.approx(value, rel=1e-5), name
    every = bmkit("tune", "lora", "-m", "tiny", *words[:2], "-s", "cache_states=true", "-o", "x")
    assert every.returncode == 2 and "can't be kept" in every.stderr


def test_rows_are_packed_where_the_recipe_says_so(
    bmkit: Run, tiny: Path, texts: Path, bert: Path, labelled: Path
) -> None:
    words = ("--data", texts, "--json", "-s", "data.max_length=256")
    plain = metrics(bmkit("tune", "lora", "-m", "tiny", "-o", "a", *words))
    packed = metrics(
        bmkit("tune", "lora", "-m", "tiny", "-o", "b", *words, "-s", "data.packing=true")
    )
    assert packed["tokens"] == plain["tokens"] and packed["steps"] < plain["steps"] / 2
    assert packed["dev_loss_before"] == plain["dev_loss_before"] > packed["dev_loss"]
    words = ("--data", labelled, "-s", "data.packing=true", "-o", "c")
    refused = bmkit("tune", "lora", "-m", bert, *words)
    assert refused.returncode == 2 and "packed" in refused.stderr


def test_deltas_are_merged_or_added_up_afterwards(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        words = ("--data", texts, "-o", name, "--seed", seed, *SHORT)
        assert bmkit("tune", "lora", "-m", "tiny", *words).returncode == 0
    found = result(bmkit("merge", "-m", "a", "-o", "m", "--json"))
    assert found["kind"] == "model"
    answers = ("-p", "Number 3?", "--max-new-tokens", "8", "--json")
    ids = [
        json.loads(bmkit("infer", *words, *answers).stdout)["token_ids"]
        for words in (("-m", "a"), ("-m", "m"))
    ]
    assert ids[0] == ids[1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    words = ("-m", "a", "--adapter", "b", "--weights", "1,-0.5", "-o", "sum", "--json")
    assert result(bmkit("merge", *words))["kind"] == "delta"
    assert result(bmkit("merge", *words))["reused"] is True
    parts = {n: load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "b", "sum")}
    key = next(k for k in parts["sum"] if "q_proj.lora_A" in k)
    other = key.replace("lora_A", "lora_B")

    def update(name: str) -> torch.Tensor:
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        rank = len(parts[name][key])
        return (
            config["lora_alpha"] / config["r"] * parts[name][other] @ parts[name][key]
            if (name != "sum")
            else (config["lora_alpha"] / rank) * parts[name][other] @ parts[name][key]
        )

    wanted = update("a") - 0.5 * update("b")
    assert torch.allclose(update("sum"), wanted, atol=1e-5)
    for words, code in (
        (("-m", "tiny"), 2),
        (("-m", "a", "--weights", "1,2"), 2),
        (("-m", "a", "--weights", "one"), 2),
        (("-m", "tiny", "--adapter", "tiny"), 3),
    ):
        assert bmkit("merge", *words, "-o", "z").returncode == code


def zeros_of(path: Path) -> dict[str, torch.Tensor]:
    """Return where the matrices of a checkpoint are zero, if a tenth of them is."""
    found = load_file(path / "model.safetensors")
    return {n: t == 0 for n, t in found.items() if t.ndim == 2 and (t == 0).float().mean() > 0.1}


def test_a_pruned_models_zeros_stay(bmkit: Run, tiny: Path, texts: Path, tmp_path: Path) -> None:
    words = ("-m", "tiny", "-o", "sparse", "-s", "steps.0.pattern=2:4")
    assert bmkit("compress", "magnitude", *words).returncode == 0
    zeros = zeros_of(tmp_path / "sparse")
    assert len(zeros) == 14
    words = ("-m", "sparse", "--data", texts, *SHORT)
    lora = metrics(bmkit("tune", "lora", *words, "-o", "m", "-s", "merge=true"))
    assert lora["dev_loss"] < lora["dev_loss_before"]
    whole = recipe(tmp_path, more="unfreeze: [all]\nmerge: true\n")
    assert bmkit("tune", whole, *words, "-o", "w").returncode == 0
    for name in ("m", "w"):
        after = load_file(tmp_path / name / "model.safetensors")
        assert all((after[key][mask] == 0).all() for key, mask in zeros.items())
        before = load_file(tmp_path / "sparse" / "model.safetensors")
        assert not any(torch.equal(after[key], before[key]) for key in zeros)
    again = ("-m", "m", "--data", texts, *SHORT, "-s", "train.max_steps=1")
    said = metrics(bmkit("tune", "lora", *again))
    assert said["dev_loss_before"] == pytest.approx(lora["dev_loss"], rel=0.02)  # in bfloat16
    refused = bmkit("tune", "oft", *words, "-o", "x", "-s", "merge=true")
    assert refused.returncode == 2 and "zeros" in refused.stderr
    assert bmkit("tune", "lora", *words, "-o", "d").returncode == 0
    refused = bmkit("merge", "-m", "d", "-o", "y")
    assert refused.returncode == 3 and "zeros" in refused.stderr


@pytest.mark.parametrize("method", ["adapter", "parallel_adapter", "bitfit", "layer_norm", "ia3"])
def test_a_delta_is_trained_within_a_budget(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, method: str
) -> None:
    words = ("-m", "tiny", "--data", texts, *SHORT)
    within = metrics(bmkit("tune", method, *words, "-o", "d", "--cpu-memory", "400MiB"))
    without = metrics(bmkit("tune", method, *words, "-o", "e"))
    assert within["dev_loss"] == pytest.approx(without["dev_loss"], rel=1e-3)
    answer = bmkit("infer", "-m", "d", "-p", "Hi", "--max-new-tokens", "4")
    assert answer.returncode == 0, answer.stderr
    refused = bmkit("tune", "prompt", *words, "-o", "f", "--cpu-memory", "400MiB")
    assert refused.returncode == 2 and "budget" in refused.stderr


def test_the_better_of_two_answers_becomes_likelier(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "train.jsonl", rows[:32])
    write(tmp_path / "pairs" / "dev.jsonl", rows[32:])
    words = ("--data", "pairs", "-o", "d", *SHORT, "-s", "train.max_steps=30")
    found = metrics(bmkit("tune", "lora", "-m", "tiny", *words))
    assert found["dev_loss_before"] == pytest.approx(0.693147, abs=1e-4)  # log 2: nothing gained
    assert found["dev_loss"] < 0.3 and found["dev_accuracy"] == 1.0
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b"}] * 2)
    refused = bmkit("tune", "lora", "-m", "tiny", "--data", bad, "-o", "x")
    assert refused.returncode == 3 and "rejected" in refused.stderr


def test_experts_that_share_a_parameter_are_tuned(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, with_tokenizer: Any
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2MoeConfig(vocab_size=400, num_experts=4, num_experts_per_tok=2, **sizes, **counts)  # type: ignore[arg-type]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    with_tokenizer(tmp_path / "moe")
    where = "target_parameters: [experts.gate_up_proj, experts.down_proj]"
    path = recipe(tmp_path, f"type: lora, r: 2, target_modules: [], {where}")
    words = ("tune", path, "-m", "moe", "--data", texts, *SHORT)
    count = 2 * 4 * 2 * (16 + 16 + 16 + 8)
    plan = bmkit(*words, "--plan").stdout
    assert f'"train lora on 4 parameters of experts ({count} parameters)"' in plan
    assert json.loads(bmkit(*words, "--inspect").stdout)["trained"] == count
    kept = metrics(bmkit(*words, "-o", "d"))
    assert kept["trainable_parameters"] == count and kept["dev_loss"] < kept["dev_loss_before"]
    again = ("-s", "train.gradient_checkpointing=true", "-s", "merge=true")
    merged = metrics(bmkit(*words, "-o", "m", *again))
    assert merged["dev_loss"] == pytest.approx(kept["dev_loss"], rel=1e-4)
    answers = ("-p", "Number 3?", "--max-new-tokens", "8", "--json")
    said = [json.loads(bmkit("infer", "-m", name, *answers).stdout) for name in ("d", "m")]
    assert said[0]["token_ids"] == said[1]["token_ids"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for more, code, told in (
        (("-s", "deltas.0.target_parameters=[experts.gate_proj]"), 2, "experts.gate_up_proj"),
        (("-s", "deltas.0.lora_dropout=0.1"), 2, "target_parameters"),
        (("--cpu-memory", "400MiB"), 2, "budget"),
    ):
        refused = bmkit(*words, "-o", "x", *more)
        assert refused.returncode == code and told in refused.stderr


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_learn_what_one_does(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, launcher: str
) -> None:
    words = ["tune", "lora", "-m", "tiny", "--data", str(texts), "--json"]
    words += ["-s", "train.num_train_epochs=2", "-s", "cache_states=false"]
    one = bmkit(*words, "-o", "one", "-s", "train.per_device_train_batch_size=8")
    module, *how = LAUNCHERS[launcher]
    if launcher == "accelerate":  # several launches at a time want ports of their own
        how.append(f"--main_process_port={free_port()}")
    launch = [sys.executable, "-m", module, *how, "-m", "bmkit_cli", *words, "-o", "two"]
    launch += ["-s", "train.per_device_train_batch_size=4"]
    two, again = (
        subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True) for _ in range(2)
    )
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    alone, together = metrics(one), metrics(two)
    assert together["steps"] == alone["steps"] == 8
    for name in ("train_loss", "dev_loss", "dev_loss_before"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4)
    assert len(two.stdout.splitlines()) == 1
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert result(again)["reused"] is True and again.stderr.count("is reused") == 1


SHARED = {
    "llama": ("lora", "-s", "deltas.0.use_dora=true"),
    "t5": ("lora", "-s", "train.gradient_checkpointing=true"),
    "gpt2": ("adapter",),
}


@pytest.mark.parametrize("model", SHARED)
def test_processes_that_share_out_the_weights_learn_the_same(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path, with_tokenizer: Any, model: str
) -> None:
    torch.manual_seed(0)
    if model == "llama":
        tiny.rename(tmp_path / "llama")
    elif model == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        t5 = T5Config(vocab_size=400, **sizes, decoder_start_token_id=0)  # type: ignore[arg-type]
        AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(tmp_path / "t5")
    else:
        gpt2 = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    if model != "llama":
        with_tokenizer(tmp_path / model)
    words = ["tune", *SHARED[model], "-m", model, "--data", str(texts), "--json"]
    words += ["-s", "train.max_steps=3", "-s", "train.per_device_train_batch_size=2"]
    found = {}
    for shared in ("false", "true"):
        launch = [sys.executable, "-m", *LAUNCHERS["torchrun"], "-m", "bmkit_cli", *words]
        launch += ["-o", f"shared-{shared}"]
        found[shared] = subprocess.run(
            launch,
            cwd=tmp_path,
            env={**os.environ, "ACCELERATE_USE_FSDP": shared},
            capture_output=True,
            text=True,
        )
        assert found[shared].returncode == 0, found[shared].stderr
    assert "tokens/s" in found["false"].stderr
    told = "each process keeps"
    assert [told in found[s].stderr for s in ("true", "false")] == [True, False]
    one, two = (metrics(found[s]) for s in ("true", "false"))
    assert one.keys() == two.keys() and one["steps"] == 3
    for name in one:
        assert one[name] == pytest.approx(two[name], rel=1e-5), name
    deltas = [
        load_file(tmp_path / f"shared-{s}" / "adapter_model.safetensors") for s in ("true", "false")
    ]
    assert deltas[0].keys() == deltas[1].keys()
    for name, tensor in deltas[0].items():
        assert torch.allclose(tensor, deltas[1][name], atol=1e-5), name


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("-s", "merge=true"), "merge: no process has the whole model"),
        (("--cpu-memory", "2GiB"), "a budget and sharing the weights out"),
        (("-s", "cache_states=true"), "cache_states: they can't be kept"),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_are_shared_out(
    bmkit: Run, tiny: Path, texts: Path, more: tuple[str, ...], told: str
) -> None:
    words = ("tune", "lora", "-m", "tiny", "--data", texts, "--plan")
    env = {**of(0, 2), "ACCELERATE_USE_FSDP": "true"}
    good = bmkit(*words, **env)
    assert good.returncode == 0 and "share the frozen weights out among 2" in good.stdout
    refused = bmkit(*words, *more, **env)
    assert refused.returncode == 2 and told in refused.stderr


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def of(rank: int, world: int) -> dict[str, str]:
    """Return what a launcher tells process `rank` of so many."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 29500}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def test_a_run_is_known_by_how_many_processes_it_has(bmkit: Run, tiny: Path, texts: Path) -> None:
    words = ("tune", "lora", "-m", "tiny", "--data", texts, "-s", "train.max_steps=1")
    done = result(bmkit(*words, "--json"))
    plans = {n: json.loads(bmkit(*words, "--plan", "--json", **of(0, n)).stdout) for n in (1, 2, 3)}
    assert plans[1]["key"] == done["key"]
    assert [plans[n]["reused"] for n in (1, 2, 3)] == [True, False, False]
    assert len({plan["key"] for plan in plans.values()}) == 3
    assert bmkit(*words, "--plan", "--json", **of(1, 2)).stdout == ""  # the first one tells it
    taken = bmkit(*words, "-o", done["path"], "--plan", **of(0, 2))
    assert taken.returncode == 3 and "another recipe" in taken.stderr


def test_a_launcher_that_starts_one_process_for_several_is_told_of(
    bmkit: Run, tiny: Path, texts: Path, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    words = ["-m", "bmkit_cli", "tune", "lora", "-m", "tiny", "--data", str(texts), "-o", "x"]
    done = subprocess.run([*launch, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "has started one" in done.stderr
    assert not (tmp_path / "x").exists()
